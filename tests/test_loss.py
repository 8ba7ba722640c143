import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jmoe import config, training
from jmoe.batch import Batch
from jmoe.loss import cross_entropy, forward

B, S, D, V = 3, 14, 8, 37
Z = 0.3


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
    mask = jnp.asarray(rng.random((B, S)) < 0.7)
    return hidden, head, targets, mask


def whole(hidden, head, targets, mask):
    """All logits at once, from the definitions, differentiated by JAX."""
    logits = hidden @ head
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    log_partition = jnp.log(jnp.exp(logits).sum(-1))
    nll, z_squared = (jnp.where(mask, of_token, 0).sum() for of_token in (nll, log_partition**2))
    return nll + Z * z_squared, nll, z_squared


@partial(jax.jit, static_argnums=0)
def gradients(f, case):
    """Of a third of the loss, by hidden states and head, after the loss and the two sums for metrics."""
    hidden, head, targets, mask = case

    def third(hidden, head):
        loss, *others = f(hidden, head, targets, mask)
        return loss / 3, (loss, *others)

    grads, sums = jax.grad(third, argnums=(0, 1), has_aux=True)(hidden, head)
    return *sums, *grads


@pytest.mark.parametrize("chunk_tokens", [1, 3 * 4, 3 * 5, 3 * 14, 10**6])
def test_chunks_change_no_value_and_no_gradient(case, chunk_tokens):
    got = gradients(lambda *args: cross_entropy(*args, chunk_tokens, Z), case)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), got, gradients(whole, case))
    alone = cross_entropy(*case, chunk_tokens, Z)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), alone, got[:3])


def test_without_z_loss_the_loss_is_the_cross_entropy(case):
    loss, nll, z_squared = cross_entropy(*case, 12, 0.0)
    assert loss == nll and z_squared > 0


def test_logits_of_the_whole_batch_are_never_held(case):
    """No array of the program, forward or backward, has B·S·V elements when chunks are asked for."""
    hidden, head, targets, mask = case
    loss = lambda h, w, chunk: cross_entropy(h, w, targets, mask, chunk, Z)[0]  # noqa: E731

    def largest(chunk):
        program = jax.jit(jax.grad(lambda h, w: loss(h, w, chunk), argnums=(0, 1))).lower(hidden, head)
        text = program.compile().as_text()
        shapes = re.findall(r"f32\[([0-9,]+)\]", text)
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    assert largest(B * S) >= B * S * V
    assert largest(B * 2) < B * S * V / 3


def products(jaxpr, size):
    """How many matrix products of a program have an operand or a result with a dimension of that size."""
    found = sum(products(inner, size) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params))
    shapes = (
        [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        for equation in jaxpr.eqns
        if equation.primitive.name == "dot_general"
    )
    return found + sum(any(size in shape for shape in of_one) for of_one in shapes)


def test_a_train_step_has_three_products_of_the_vocabulary_and_an_evaluation_one():
    """The logits are not computed again for the backward pass, nor gradients where none is asked for."""
    tokens = jnp.zeros((2, 16), jnp.int32)
    batch = Batch(tokens, tokens, tokens + 1, tokens, tokens == 0)
    layers = (config.LayerGroup((config.Dense(8),)),)
    model = config.Model(V, d_model=D, num_heads=2, num_kv_heads=1, head_dim=4, tie_embeddings=False, layers=layers)
    settings = config.Config(model=model, batch_size=2, loss=config.Loss(chunk_tokens=8))
    state = jax.eval_shape(lambda: training.init_state(settings))
    step = jax.make_jaxpr(partial(training.train_step, settings=settings))(state, batch)
    assert products(step.jaxpr, V) == 3
    evaluation = jax.make_jaxpr(partial(forward, settings=settings))(state.params, batch)
    assert products(evaluation.jaxpr, V) == 1


def test_masked_targets_have_no_effect(case):
    hidden, head, targets, mask = case
    other = jnp.where(mask, targets, (targets + 1) % V)
    of_loss = partial(gradients, partial(cross_entropy, chunk_tokens=12, z_weight=Z))
    got, want = of_loss((hidden, head, other, mask)), of_loss(case)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    nothing = of_loss((hidden, head, targets, jnp.zeros_like(mask)))
    assert not any(jnp.any(x) for x in nothing)


def test_bfloat16_hidden_states_give_float32_sums(case):
    hidden, *others = case
    low = cross_entropy(hidden.astype(jnp.bfloat16), *others, 12, Z)
    assert all(x.dtype == jnp.float32 for x in low)
    np.testing.assert_allclose(low, cross_entropy(*case, 12, Z), rtol=2e-2)


def test_bfloat16_gradients_follow_the_float32_ones(case):
    hidden, *others = case
    got = gradients(lambda *args: cross_entropy(*args, 12, Z), (hidden.astype(jnp.bfloat16), *others))[3:]
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32]
    for low, high in zip(got, gradients(whole, case)[3:], strict=True):
        np.testing.assert_allclose(low.astype(jnp.float32), high, rtol=5e-2, atol=5e-2 * jnp.abs(high).max())
