"""What the optimiser takes each parameter for, from its logical axes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jmoe import config, optim, training
from jmoe.model.layers import parameter
from jmoe.optim import roles

MODEL = config.Model(
    d_model=32,
    tie_embeddings=False,
    layers=(
        config.LayerGroup((config.Dense(48),)),
        config.LayerGroup(
            (config.MoE(8, 32, config.TopK(2, bias_rate=0.1), widths="hybrid", shared_d_ff=8, shared_gate=True),),
            repeats=3,
        ),
    ),
)


def rows(settings):
    params = jax.eval_shape(lambda: training.init_state(config.Config(model=MODEL)).params)
    first, *lines = roles.table(settings, params).splitlines()
    assert re.split(r"  +", first)[:3] == ["parameter", "role", "rule"]
    return {path: rest for path, *rest in (re.split(r"  +", line) for line in lines)}


def test_the_table_tells_what_happens_to_each_parameter():
    table = rows(config.Muon(learning_rates=config.ByRole(router=0.5), decays=config.ByRole(norm=0.0)))
    moe = "layers.1.0.feed_forward"
    assert table["embedding"] == ["embedding", "AdamW", "257, 32", "-", "x 1", "0.1", "1"]
    assert table["head"] == ["head", "AdamW", "32, 257", "-", "x 1", "0.1", "1"]
    assert table["final_norm.gain"] == ["norm", "AdamW", "32", "-", "x 1", "0", "1"]
    out = ["attention", "Muon", "3, 4, 32, 32", "3 x (128, 32)", "x 1", "0.1", f"{0.2 * 128**0.5:.4g}"]
    assert table["layers.1.0.attention.out"] == out
    assert table["layers.0.0.feed_forward.gate"][:4] == ["feed_forward", "Muon", "1, 32, 48", "1 x (32, 48)"]
    assert table[f"{moe}.shared.swiglu.up"][:4] == ["feed_forward", "Muon", "3, 32, 8", "3 x (32, 8)"]
    assert table[f"{moe}.shared.weight"][:4] == ["router", "Muon", "3, 32, 1", "3 x (32, 1)"]
    assert table[f"{moe}.router.weight"][1:5] == ["Muon", "3, 32, 8", "3 x (32, 8)", "x 0.5"]
    assert table[f"{moe}.router.bias"] == ["buffer", "-", "3, 8", "-", "-", "-", "-"]
    widths = [table[f"{moe}.experts.buckets.{bucket}.down"] for bucket in range(3)]
    assert [row[3] for row in widths] == ["12 x (16, 32)", "6 x (32, 32)", "6 x (64, 32)"]
    assert [row[-1] for row in widths] == ["1.131", "1.131", "1.6"]
    apart = rows(config.NorMuon(heads="apart"))["layers.1.0.attention.query"]
    assert apart[1:4] == ["NorMuon", "3, 32, 4, 32", "12 x (32, 32)"] and apart[-1] == "to rms 0.2"
    assert {row[1] for row in rows(config.AdamW()).values()} == {"AdamW", "-"}
    assert rows(config.Muon(matrices=("experts",)))[f"{moe}.router.weight"][1] == "AdamW"


def test_axes_that_nobody_knows_are_an_error():
    with pytest.raises(KeyError, match="embed"):
        roles.role(("embed", "embed"))


def test_factors_apply_by_role_and_decay_follows_the_learning_rate():
    """Relative to the same update without them."""
    ones = {
        "gain": parameter(jnp.ones(3), "embed"),
        "router": parameter(jnp.ones((3, 4)), "embed", "router"),
        "bias": parameter(jnp.ones(4), "router"),
    }

    def update(**factors):
        rule = optim.transformation(dataclasses.replace(config.AdamW(clip_norm=1e9, weight_decay=0.5), **factors))
        return {name: float(v[...].ravel()[0]) for name, v in rule.update(ones, rule.init(ones), ones)[0].items()}

    assert update() == pytest.approx({"gain": 1.0, "router": 1.5, "bias": 0.0}, abs=1e-5)
    factors = {"learning_rates": config.ByRole(router=0.1), "decays": config.ByRole(norm=2.0, router=3.0)}
    assert update(**factors) == pytest.approx({"gain": 2.0, "router": 0.25, "bias": 0.0}, abs=1e-5)
