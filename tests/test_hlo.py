"""The reader of compiled programs on a small one, written as XLA writes them for TPUs."""

import pytest

from jmoe import hlo

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (x: bf16[64,16]) -> bf16[16,16] {
  %x = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = bf16[16,16]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={16,16}
}

%fused_product (rows: bf16[32,64], weights: bf16[64,16]) -> f32[32,16] {
  %rows = bf16[32,64]{1,0} parameter(0)
  %weights = bf16[64,16]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %product = f32[32,16]{1,0} convolution(%rows, %weights), dim_labels=bf_io->bf, backend_config={"a":{"estimated_cycles":"7"}}
}

%body (state: (s32[], bf16[32,64], bf16[16,16])) -> (s32[], bf16[32,64], bf16[16,16]) {
  %state = (s32[]{:T(128)}, bf16[32,64]{1,0}, /*index=2*/bf16[16,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %rows.1 = bf16[32,64]{1,0} get-tuple-element(%state), index=1
  %own.1 = bf16[16,16]{1,0} get-tuple-element(%state), index=2
  %gather = (bf16[16,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%own.1), replica_groups=[2,4]<=[8], dimensions={0}
  %gathered = bf16[64,16]{1,0} all-gather-done(%gather)
  %fusion = f32[32,16]{1,0} fusion(%rows.1, %gathered), kind=kOutput, calls=%fused_product, backend_config={"a":{"estimated_cycles":"100"}}
  %gmm.3 = bf16[32,16]{1,0} custom-call(%i, %rows.1, %gathered), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"(=%{","cost_estimate":{"flops":"1000","transcendentals":"0"}}}
  %silent.2 = bf16[32,16]{1,0} custom-call(%rows.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x"}}
  %scattered = bf16[16,16]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[]{:T(128)}, bf16[32,64]{1,0}, bf16[16,16]{1,0}) tuple(%i, %rows.1, %scattered)
}

%condition (state.1: (s32[], bf16[32,64], bf16[16,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %state.1 = (s32[]{:T(128)}, bf16[32,64]{1,0}, bf16[16,16]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (start: (s32[], bf16[32,64], bf16[16,16])) -> f32[8] {
  %start = (s32[]{:T(128)}, bf16[32,64]{1,0}, bf16[16,16]{1,0}) parameter(0)
  %loop = (s32[]{:T(128)}, bf16[32,64]{1,0}, bf16[16,16]{1,0}) while(%start), condition=%condition, body=%body
  %scalars = f32[8]{0} constant({...})
  ROOT %total = f32[8]{0} all-reduce(%scalars), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_runs():
    work = hlo.work(PROGRAM, {"silent": lambda name, operands: 10.0 * operands[0].dims[1]})
    assert work.products == 5 * 2 * 32 * 64 * 16
    assert work.kernels == {"gmm": 5 * 1000, "silent": 5 * 640}
    assert work.claims == {"gmm": 5 * 1000}
    assert work.cycles == 5 * 100  # that of the fusion stands for what is in it
    assert work.unknown_loops == 0 and not work.unknown_kernels


def test_bytes_that_a_device_receives():
    """Of a gather the others' parts, of a reduce-scatter as many, of an all-reduce both; groups of 4, 4 and 2."""
    work = hlo.work(PROGRAM)
    assert work.moved == {"all-gather": 5 * 3 * 512, "reduce-scatter": 5 * 2048 * 3 / 4, "all-reduce": 2 * 32 * 1 / 2}
    assert work.collectives == {"all-gather": 5, "reduce-scatter": 5, "all-reduce": 1}
    assert work.unknown_kernels == {"silent": 5}


def test_a_ragged_exchange_moves_rows_and_not_the_buffer_they_go_to():
    sent = (
        "  %sent = bf16[64,16]{1,0} ragged-all-to-all(%own.1, %gathered, %i, %i, %i, %i), replica_groups=[2,4]<=[8]\n"
    )
    place = PROGRAM.index("  %fusion =")
    work = hlo.work(PROGRAM[:place] + sent + PROGRAM[place:])
    assert work.moved["ragged-all-to-all"] == 5 * 512 * 3 / 4


def test_a_collective_under_way_in_several_fusions_counts_once():
    flag = '"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}'
    again = "  %more = bf16[64,16]{1,0} all-gather(%own.1), replica_groups=[2,4]<=[8], backend_config={" + flag + "}\n"
    place = PROGRAM.index("  %gathered")
    assert hlo.work(PROGRAM[:place] + again + PROGRAM[place:]).moved == hlo.work(PROGRAM).moved


def test_a_loop_with_two_rounds_in_one_runs_half_as_often():
    two = "  %two = s32[] constant(2)\n  %later = s32[]{:T(128)} add(%i, %two)\n"
    place = PROGRAM.index("  ROOT %next")
    program = PROGRAM[:place] + two + PROGRAM[place:].replace(" tuple(%i,", " tuple(%later,", 1)
    assert hlo.work(program).products == 3 * 2 * 32 * 64 * 16


def test_a_loop_whose_end_is_not_known_is_told():
    work = hlo.work(PROGRAM.replace("constant(5)", "parameter(1)"))
    assert work.unknown_loops == 1 and work.products == 2 * 32 * 64 * 16


def test_loops_that_balanced_experts_do_not_enter_count_for_nothing():
    line = next(line for line in PROGRAM.splitlines() if " while(" in line)
    idle = line + ', metadata={op_name="jit(train_step)/shard_map/further_rounds/while"}'
    assert hlo.work(PROGRAM.replace(line, idle)).products == 0


@pytest.mark.parametrize(
    ("out", "left", "right", "attributes", "flops"),
    [
        # A batch of 16 products of [4, 8] and [8, 2], as a window of 16 that meets one element at a time.
        ((16, 4, 2), (16, 4, 8), (16, 8, 2), "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf", 2048),
        ((4, 1, 16), (4, 1, 8), (1, 8, 16), "window={size=1}, dim_labels=b0f_0io->b0f", 1024),
    ],
)
def test_convolutions_count_what_meets_an_element(out, left, right, attributes, flops):
    shapes = (hlo.Shape("f32", dims) for dims in (out, left, right))
    assert hlo.convolution_flops(*shapes, attributes) == flops
