"""Impossible values are refused where they are made, in one line that names the numbers."""

import pytest

from jmoe.config import (
    BPE,
    WSD,
    AdamW,
    ByRole,
    Checkpoint,
    Config,
    Constant,
    Cosine,
    Data,
    Dense,
    Embedded,
    Evaluation,
    InputError,
    LayerGroup,
    Loss,
    Mesh,
    Model,
    MoE,
    Muon,
    NorMuon,
    Nucleus,
    TopK,
)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MoE(num_experts=4, router=TopK(5)), "router.k is 5.*num_experts = 4"),
        (lambda: MoE(router=TopK(0)), "router.k is 0"),
        (lambda: TopK(scale=0.0), "router.scale is 0.0"),
        (lambda: TopK(bias_rate=-1.0), "router.bias_rate is -1.0"),
        (lambda: TopK(groups=2, groups_per_token=3), "groups_per_token is 3.*groups = 2"),
        (lambda: MoE(6, router=TopK(groups=4)), "groups = 4 does not divide the 6 experts"),
        (lambda: MoE(8, router=TopK(3, groups=4)), "router.k is 3.*between 1 and num_experts = 2 in 1 of 4 groups"),
        (lambda: Nucleus(max_slots=0), "max_slots is 0"),
        (lambda: Nucleus(p_rate=0.0), "p_rate is 0.0"),
        (lambda: MoE(8, router=Nucleus(experts_per_token=9.0)), "experts_per_token is 9.0.*between 1 and the 8 slots"),
        (lambda: MoE(8, router=Nucleus(max_slots=2, experts_per_token=3.0)), "between 1 and the 2 slots"),
        (lambda: Nucleus(0.0), r"router.p is 0.0.*\(0, 1\]"),
        (lambda: Nucleus(1.01), "router.p is 1.01"),
        (lambda: Nucleus(float("nan")), "router.p is nan"),
        (lambda: Dense(0), "d_ff is 0"),
        (lambda: MoE(num_experts=0), "num_experts is 0"),
        (lambda: MoE(2, (3, 4, 5)), "d_ff lists 3 widths.*num_experts = 2"),
        (lambda: MoE(2, (4, 3)), "from narrow to wide"),
        (lambda: MoE(2, (0, 3)), "an expert of width 0"),
        (lambda: MoE(12, widths="hybrid"), "widths = hybrid is for a multiple of 8 experts, not 12"),
        (lambda: MoE(8, (4,) * 8, widths="hybrid"), "needs the mean width as d_ff"),
        (lambda: MoE(8, 2, widths="geometric"), "an expert of width 0"),
        (lambda: MoE(shared_gate=True), "shared_gate needs a shared expert"),
        (lambda: MoE(identity_experts=-1), "identity_experts is -1"),
        (lambda: LayerGroup(()), "pattern is empty"),
        (lambda: LayerGroup(repeats=0), "repeats is 0"),
        (lambda: Model(num_heads=6, num_kv_heads=4), "num_heads = 6 is not divisible by model.num_kv_heads = 4"),
        (lambda: Model(head_dim=7), "head_dim is 7"),
        (lambda: Model(vocab_size=0), "vocab_size is 0"),
        (lambda: Model(layers=()), "layers is empty"),
        (lambda: BPE(vocab_size=256), "vocab_size is 256"),
        (lambda: Data(sources=()), "sources is empty"),
        (lambda: Data(sources=(Embedded(weight=0.0),)), "data.sources: weight .* is 0.0"),
        (lambda: Data(validation=(Embedded(weight=-1.0),)), "data.validation: weight .* is -1.0"),
        (lambda: Data(validation_fraction=1.0), "validation_fraction is 1.0"),
        (lambda: Data(validation_fraction=0.0), "validation_fraction is 0.0"),
        (lambda: Data(seq_len=1), "seq_len is 1"),
        (lambda: WSD(decay_fraction=1.5), "decay_fraction is 1.5"),
        (lambda: AdamW(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: AdamW(b2=1.0), "b2 is 1.0"),
        (lambda: AdamW(schedule=Constant(-1)), "warmup_steps is -1"),
        (lambda: Muon(learning_rate=0.0), "optim.learning_rate is 0.0"),
        (lambda: Muon(momentum=1.0), "optim.momentum is 1.0"),
        (lambda: Muon(iterations=0), "optim.iterations is 0"),
        (lambda: NorMuon(rms=0.0), "optim.rms is 0.0"),
        (lambda: NorMuon(output_decay=-0.1), "optim.output_decay is -0.1"),
        (lambda: AdamW(decays=ByRole(head=-1.0)), "the factor of role head is -1.0"),
        (lambda: Loss(z_loss=-1.0), "z_loss is -1.0"),
        (lambda: Mesh(data=0), "mesh.data is 0"),
        (lambda: Mesh(data=-1, fsdp=-1), "only one axis can be -1"),
        (lambda: Checkpoint(keep=0), "keep is 0"),
        (lambda: Checkpoint(keep_every=0), "keep_every is 0"),
        (lambda: Evaluation(batches=0), "batches is 0"),
        (lambda: Config(steps=0), "steps is 0"),
        (lambda: Config(seed=-1), "seed is -1"),
        (lambda: Config(batch_size=6, accumulation=4), "batch_size = 6 is not divisible by accumulation = 4"),
        (lambda: Config(steps=10, optim=AdamW(schedule=Cosine(11))), "warmup_steps = 11 is more than steps = 10"),
    ],
)
def test_impossible_values_are_refused_in_one_line(make, says):
    with pytest.raises(InputError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("experts", "p", "slots"), [(16, 0.4, 7), (100, 0.29, 30), (16, 1.0, 16), (1, 0.4, 1), (8, 0.01, 1)]
)
def test_nucleus_slots_are_the_most_that_can_be_needed(experts, p, slots):
    assert Nucleus(p).slots(experts) == slots


def test_layers_are_counted_over_pattern_and_repeats():
    assert Model(layers=(LayerGroup((Dense(),)), LayerGroup((MoE(), Dense()), 3))).num_layers == 7


@pytest.mark.parametrize(
    ("experts", "d_ff", "preset", "widths"),
    [
        (8, 64, "arithmetic", (36, 44, 52, 60, 68, 76, 84, 92)),
        (8, 32, "hybrid", (16, 16, 16, 16, 32, 32, 64, 64)),
        (16, 2, "hybrid", (1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4)),
        (8, 100, "geometric", (3, 6, 12, 26, 50, 100, 201, 402)),  # 800 / 255 is no whole number
    ],
)
def test_presets_keep_their_proportions_and_the_total(experts, d_ff, preset, widths):
    moe = MoE(experts, d_ff, widths=preset)
    assert sorted(moe.expert_widths) == list(moe.expert_widths) and sum(moe.expert_widths) == experts * d_ff
    assert moe.expert_widths == widths
