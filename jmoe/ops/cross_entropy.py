"""Cross-entropy of a large vocabulary, without the logits of all tokens at once."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.ops.matmul import transposed


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy and squared log-partition, float32, with logits for about `chunk_tokens` tokens at a time.

    The chunks run along the sequence, so that a sharded batch stays sharded. The backward pass computes a chunk's
    logits again instead of keeping them. Products are of the dtype of `hidden`, accumulated in float32.

    Returns:
      Σ −log softmax(hidden · head)[target] over masked tokens, and Σ (log Σ_v exp logits)² over the same.
    """
    return _forward(hidden, head, targets, mask, chunk_tokens)[0]


def _split(x, chunk_tokens):
    """[B, S, ...] → [chunks, B, length, ...], padded with zeros."""
    B, S = x.shape[:2]
    length = max(1, min(S, chunk_tokens // B))
    chunks = -(-S // length)
    x = jnp.pad(x, ((0, 0), (0, chunks * length - S)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(B, chunks, length, *x.shape[2:]).swapaxes(0, 1)


def _join(x, S):
    """The inverse of `_split`: [chunks, B, length, ...] → [B, S, ...]."""
    chunks, B, length = x.shape[:3]
    return x.swapaxes(0, 1).reshape(B, chunks * length, *x.shape[3:])[:, :S]


def _logits(hidden, head):
    return jnp.einsum("BSD,DV->BSV", hidden, head, preferred_element_type=jnp.float32)


def _forward(hidden, head, targets, mask, chunk_tokens):
    weight = head.astype(hidden.dtype)

    def chunk(sums, xs):
        hidden, targets, mask = xs
        logits = _logits(hidden, weight)
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nll, z_squared = sums
        nll += jnp.sum(log_partition - target_logits, where=mask)
        return (nll, z_squared + jnp.sum(log_partition**2, where=mask)), log_partition

    zero = jnp.zeros((), jnp.float32)
    chunks = tuple(_split(x, chunk_tokens) for x in (hidden, targets, mask))
    sums, log_partition = jax.lax.scan(chunk, (zero, zero), chunks)
    return sums, (hidden, head, targets, mask, log_partition)


def _backward(chunk_tokens, residuals, d_sums):
    hidden, head, targets, mask, log_partition = residuals
    d_nll, d_z_squared = d_sums
    weight = head.astype(hidden.dtype)
    weight_transposed = transposed(weight)
    S, D = hidden.shape[1:]

    def chunk(d_head, xs):
        hidden, targets, mask, log_partition = xs
        d_log_partition = jnp.where(mask, d_nll + 2.0 * d_z_squared * log_partition, 0.0)
        d_target = jnp.where(mask, d_nll, 0.0)
        probabilities = jnp.exp(_logits(hidden, weight) - log_partition[..., None])
        is_target = targets[..., None] == jnp.arange(head.shape[1])[None, None]
        d_logits = d_log_partition[..., None] * probabilities - jnp.where(is_target, d_target[..., None], 0.0)
        d_logits = d_logits.astype(hidden.dtype)
        rows = transposed(hidden.reshape(-1, D))
        d_head += jnp.matmul(rows, d_logits.reshape(-1, head.shape[1]), preferred_element_type=jnp.float32)
        return d_head, jnp.matmul(d_logits, weight_transposed, preferred_element_type=jnp.float32).astype(hidden.dtype)

    chunks = (*(_split(x, chunk_tokens) for x in (hidden, targets, mask)), log_partition)
    d_head, d_hidden = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), chunks)
    return _join(d_hidden, S), d_head.astype(head.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
