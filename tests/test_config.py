"""Impossible values are refused where they are made, in one line that names the numbers."""

import pytest

from jmoe.config import (
    BPE,
    WSD,
    AdamW,
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
    Nucleus,
    TopK,
)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MoE(num_experts=4, router=TopK(5)), "router.k is 5.*num_experts = 4"),
        (lambda: MoE(router=TopK(0)), "router.k is 0"),
        (lambda: Nucleus(0.0), r"router.p is 0.0.*\(0, 1\]"),
        (lambda: Nucleus(1.01), "router.p is 1.01"),
        (lambda: Nucleus(float("nan")), "router.p is nan"),
        (lambda: Dense(0), "d_ff is 0"),
        (lambda: MoE(num_experts=0), "num_experts is 0"),
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
