"""The loss compiled for four TPU chips with no TPU present."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jmoe import config, hlo, loss
from jmoe.aot import topology_devices
from jmoe.batch import Batch
from jmoe.sharding import batch_sharding, make_mesh, spec

B, S, D = 4, 1024, 2048


@pytest.mark.aot
@pytest.mark.parametrize("vocabulary", [50304, 50257])
def test_no_device_sums_the_gradient_of_the_whole_head(vocabulary):
    """Of any vocabulary: the head is gathered once, and each device gets the sum of its own rows."""
    mesh = make_mesh(config.Mesh(fsdp=4), topology_devices("v5p:2x2x1")[0])

    def shape(dtype, sizes, sharding):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    ids, mask = (shape(dtype, (B, S), batch_sharding(mesh)) for dtype in (jnp.int32, jnp.bool_))
    batch = Batch(ids, ids, ids, ids, mask)
    hidden = shape(jnp.bfloat16, (B, S, D), batch_sharding(mesh))
    head = shape(jnp.float32, (D, vocabulary), NamedSharding(mesh, spec("embed", "vocab")))

    def of_head(head, hidden, batch):
        return loss._cross_entropy(hidden, head, batch, config.Loss())[0]

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(of_head), out_shardings=head.sharding)
        program = step.trace(head, hidden, batch).lower(lowering_platforms=("tpu",)).compile()
    moved = hlo.work(program.as_text() or "").moved
    others = 3 / 4 * 2 * D * vocabulary
    assert moved["all-gather"] == others
    assert moved["reduce-scatter"] == pytest.approx(others, rel=0.01)
    assert moved["all-reduce"] < 0.01 * others
