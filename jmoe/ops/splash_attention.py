"""For TPU: splash attention, the Pallas kernels that come with JAX, which leave out the blocks that no query may see.

Rows of tokens attend within segments and to none after them in the row. The backward pass is two kernels, for the
queries' gradient and for that of keys and values; each computes the scores again. JAX's own entry hides the logarithm
of the softmax's denominator from its callers, so that the two halves are called here each by itself.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

# The kernels' bounds: blocks are multiples of 128 tokens; larger than 512 has not been shown to be faster.
LANES, BLOCK = 128, 512


def supports(length: int) -> bool:
    """Whether rows of this many tokens can be divided into blocks."""
    return length % LANES == 0


def _block(length: int) -> int:
    return next(block for block in range(BLOCK, 0, -LANES) if length % block == 0)


def _splash(heads: int, length: int, interpret: bool) -> kernel.SplashAttentionKernel:
    block = _block(length)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)])
    return kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _heads_first(x):
    return x.transpose(0, 2, 1, 3)


def _scaled(queries):
    """Heads first, times 1/√H, which the kernels leave to their callers."""
    scale = queries.shape[-1] ** -0.5
    return _heads_first((queries.astype(jnp.float32) * scale).astype(queries.dtype)), scale


def forward(
    queries: Float[Array, "B S N H"],
    keys: Float[Array, "B S G H"],
    values: Float[Array, "B S G H"],
    segments: Int[Array, "B S"],
    interpret: bool = False,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N S"]]:
    """The output, in the dtype of `queries`, and the logarithm of the softmax's denominator, float32.

    Args:
      queries, keys, values: query head n reads key head n // (N/G); S as `supports` has it.
      segments: int32; a token sees those of its own segment up to itself.
      interpret: run without a TPU, slowly.
    """
    splash = _splash(queries.shape[2], queries.shape[1], interpret)
    settings = {name: splash.kwargs[name] for name in ("mask_value", "is_mqa", "block_sizes", "mask_function")}

    def row(q, k, v, segments):
        ids = kernel.SegmentIds(segments, segments)
        out, (log_partition,) = kernel._splash_attention_forward(
            splash.fwd_mask_info,
            q,
            k,
            v,
            ids,
            None,
            residual_checkpoint_name=None,
            save_residuals=True,
            interpret=interpret,
            **settings,
        )
        return out, log_partition

    q, _ = _scaled(queries)
    out, log_partition = jax.vmap(row)(q, _heads_first(keys), _heads_first(values), segments)
    return _heads_first(out), log_partition


def backward(
    queries: Float[Array, "B S N H"],
    keys: Float[Array, "B S G H"],
    values: Float[Array, "B S G H"],
    segments: Int[Array, "B S"],
    out: Float[Array, "B S N H"],
    log_partition: Float[Array, "B N S"],
    d_out: Float[Array, "B S N H"],
    interpret: bool = False,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B S G H"], Float[Array, "B S G H"]]:
    """Gradients of queries, keys and values, of what `forward` took and returned and the gradient of its output."""
    splash = _splash(queries.shape[2], queries.shape[1], interpret)
    settings = splash.kwargs

    def row(q, k, v, segments, out, log_partition, d_out):
        ids = kernel.SegmentIds(segments, segments)
        residuals = q, k, v, ids, None, out, log_partition, splash.dq_mask_info, splash.dkv_mask_info
        gradients = kernel._splash_attention_bwd(
            False,
            settings["mask_value"],
            settings["is_mqa"],
            settings["block_sizes"],
            None,
            settings["mask_function"],
            None,
            interpret,
            residuals,
            d_out,
        )
        return gradients[3:6]

    q, scale = _scaled(queries)
    k, v, out, d_out = (_heads_first(x) for x in (keys, values, out, d_out))
    d_q, d_k, d_v = jax.vmap(row)(q, k, v, segments, out, log_partition, d_out)
    d_q = (d_q.astype(jnp.float32) * scale).astype(queries.dtype)
    return _heads_first(d_q), _heads_first(d_k), _heads_first(d_v)


def kernel_flops(name: str, operands: Sequence[tuple[str, tuple[int, ...]]]) -> float:
    """FLOPs of one run of a kernel by its name in a compiled program and its operands' dtypes and shapes: that of the
    blocks on and below the diagonal, which it visits. The kernels tell the compiler nothing of their cost."""
    *rows, length, width = next(shape for dtype, shape in operands if dtype in ("bf16", "f32") and len(shape) >= 3)
    (products,) = (count for phase, count in {"fwd": 2, "dkv": 4, "dq": 3}.items() if f"_{phase}" in name)
    block = _block(length)
    visited = block * block * (length // block) * (length // block + 1) / 2
    return products * 2 * width * visited * math.prod(rows)
