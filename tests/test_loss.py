import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.loss import cross_entropy

B, S, D, V = 3, 14, 8, 37


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
    mask = jnp.asarray(rng.random((B, S)) < 0.7)
    return hidden, head, targets, mask


def whole(hidden, head, targets, mask):
    """All logits at once, from the definitions."""
    logits = hidden @ head
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    log_partition = jnp.log(jnp.exp(logits).sum(-1))
    return jnp.where(mask, nll, 0).sum(), jnp.where(mask, log_partition**2, 0).sum()


@pytest.mark.parametrize("chunk_tokens", [1, 3 * 4, 3 * 5, 3 * 14, 10**6])
def test_chunks_change_no_value_and_no_gradient(case, chunk_tokens):
    hidden, head, targets, mask = case

    def value_and_grad(f):
        def total(hidden, head):
            nll, z = f(hidden, head, targets, mask)
            return nll + 0.3 * z

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, head)

    got = value_and_grad(lambda *args: cross_entropy(*args, chunk_tokens))
    want = value_and_grad(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


def test_logits_of_the_whole_batch_are_never_held(case):
    """No array of the program, forward or backward, has B·S·V elements when chunks are asked for."""
    hidden, head, targets, mask = case
    loss = lambda h, w, chunk: cross_entropy(h, w, targets, mask, chunk)[0]  # noqa: E731

    def largest(chunk):
        program = jax.jit(jax.grad(lambda h, w: loss(h, w, chunk), argnums=(0, 1))).lower(hidden, head)
        text = program.compile().as_text()
        shapes = re.findall(r"f32\[([0-9,]+)\]", text)
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    assert largest(B * S) >= B * S * V
    assert largest(B * 2) < B * S * V / 3


def test_masked_targets_have_no_effect(case):
    hidden, head, targets, mask = case
    other = jnp.where(mask, targets, (targets + 1) % V)
    assert cross_entropy(hidden, head, targets, mask, 12) == cross_entropy(hidden, head, other, mask, 12)
    nothing = cross_entropy(hidden, head, targets, jnp.zeros_like(mask), 12)
    assert [float(x) for x in nothing] == [0.0, 0.0]


def test_bfloat16_hidden_states_give_float32_sums(case):
    hidden, head, targets, mask = case
    low = cross_entropy(hidden.astype(jnp.bfloat16), head, targets, mask, 12)
    assert all(x.dtype == jnp.float32 for x in low)
    np.testing.assert_allclose(low, cross_entropy(hidden, head, targets, mask, 12), rtol=2e-2)


def test_bfloat16_gradients_follow_the_float32_ones(case):
    hidden, head, targets, mask = case

    def gradients(f, hidden):
        return jax.grad(lambda h, w: (lambda nll, z: nll + 0.3 * z)(*f(h, w, targets, mask)), (0, 1))(hidden, head)

    got = gradients(lambda *args: cross_entropy(*args, 12), hidden.astype(jnp.bfloat16))
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32]
    for low, high in zip(got, gradients(whole, hidden), strict=True):
        np.testing.assert_allclose(low.astype(jnp.float32), high, rtol=5e-2, atol=5e-2 * jnp.abs(high).max())
