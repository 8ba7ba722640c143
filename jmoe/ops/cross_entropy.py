"""Cross-entropy of a large vocabulary, without the logits of all tokens at once, and with each logit computed once."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.ops.matmul import transposed


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    chunk_tokens: int,
    z_weight: float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Summed loss, cross-entropy and squared log-partition, float32, with logits for about `chunk_tokens` tokens at a
    time.

    The chunks run along the sequence, so that a sharded batch stays sharded. Products are of the dtype of `hidden`,
    accumulated in float32. The loss alone has a gradient, of which the other two, being for metrics, know nothing:
    where it is differentiated, a chunk's gradients are computed beside it, while its logits are there. What then waits
    for the backward pass is one gradient like `hidden` and one like `head`, in their dtypes, to be scaled.

    Args:
      z_weight: of the squared log-partition in the loss.

    Returns:
      nll + z_weight · z_squared; nll: Σ −log softmax(hidden · head)[target] over masked tokens; z_squared:
      Σ (log Σ_v exp logits)² over the same.
    """
    weight = head.astype(hidden.dtype)

    def chunk(sums, xs):
        hidden, targets, mask = xs
        return _add(sums, _logits(hidden, weight), targets, mask)[0], None

    sums, _ = jax.lax.scan(chunk, _zeros(), _chunks(chunk_tokens, hidden, targets, mask))
    return _with_loss(sums, z_weight)


def _chunks(chunk_tokens, *arrays):
    """[B, S, ...] → [chunks, B, length, ...], each, padded with zeros."""

    def split(x):
        B, S = x.shape[:2]
        length = max(1, min(S, chunk_tokens // B))
        chunks = -(-S // length)
        x = jnp.pad(x, ((0, 0), (0, chunks * length - S)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, chunks, length, *x.shape[2:]).swapaxes(0, 1)

    return tuple(map(split, arrays))


def _joined(x, S):
    """[chunks, B, length, ...] → [B, S, ...], without the padding."""
    chunks, B, length = x.shape[:3]
    return x.swapaxes(0, 1).reshape(B, chunks * length, *x.shape[3:])[:, :S]


def _zeros():
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def _logits(hidden, head):
    return jnp.einsum("BSD,DV->BSV", hidden, head, preferred_element_type=jnp.float32)


def _add(sums, logits, targets, mask):
    """(nll, z_squared) with a chunk's added, and the chunk's log-partitions."""
    nll, z_squared = sums
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll += jnp.sum(log_partition - target_logits, where=mask)
    return (nll, z_squared + jnp.sum(log_partition**2, where=mask)), log_partition


def _with_loss(sums, z_weight):
    nll, z_squared = sums
    return nll + z_weight * z_squared, nll, z_squared


def _forward(hidden, head, targets, mask, chunk_tokens, z_weight):
    (S, D), V = hidden.shape[1:], head.shape[1]
    weight = head.astype(hidden.dtype)
    weight_transposed = transposed(weight)

    def chunk(carry, xs):
        (sums, d_head), (hidden, targets, mask) = carry, xs
        logits = _logits(hidden, weight)
        sums, log_partition = _add(sums, logits, targets, mask)
        d_log_partition = jnp.where(mask, 1.0 + 2.0 * z_weight * log_partition, 0.0)
        probabilities = jnp.exp(logits - log_partition[..., None])
        is_target = mask[..., None] & (targets[..., None] == jnp.arange(V)[None, None])
        d_logits = (d_log_partition[..., None] * probabilities - is_target).astype(hidden.dtype)
        rows = transposed(hidden.reshape(-1, D))
        d_head += jnp.matmul(rows, d_logits.reshape(-1, V), preferred_element_type=jnp.float32)
        d_hidden = jnp.matmul(d_logits, weight_transposed, preferred_element_type=jnp.float32)
        return (sums, d_head), d_hidden.astype(hidden.dtype)

    carry = _zeros(), jnp.zeros(head.shape, jnp.float32)
    (sums, d_head), d_hidden = jax.lax.scan(chunk, carry, _chunks(chunk_tokens, hidden, targets, mask))
    return _with_loss(sums, z_weight), (_joined(d_hidden, S), d_head.astype(head.dtype))


def _backward(chunk_tokens, z_weight, gradients, d_sums):
    d_loss, *_ = d_sums
    return (*((d_loss * gradient).astype(gradient.dtype) for gradient in gradients), None, None)


cross_entropy.defvjp(_forward, _backward)
