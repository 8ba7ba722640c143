"""Every token through the SwiGLU experts it was routed to, at the cost of the rows that are really routed.

    out[t] = Σ_k w[t, k] · (silu(x_t · gate_e) ∘ (x_t · up_e)) · down_e,  e = expert_ids[t, k]

Experts are numbered through the buckets, each of which holds the experts of one width. On CPU one loop visits blocks of
rows sorted by expert and does all that a block needs while it is in the cache: gather, the products, the elementwise
part, and the sum over a token's experts. Elsewhere the same function is composed of `grouped_matmul` over all rows. A
row's combine weight multiplies its hidden features, so that its gradient needs no expert's output.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.ops.grouped_matmul import grouped_matmul
from jmoe.ops.matmul import rounded
from jmoe.ops.permute import Plan, sum_slots

# Rows of a block on CPU. Large blocks make fast products and few passes over the sums of weight gradients; a fine
# choice of sizes leaves few rows empty, and takes longer to compile.
BLOCKS = tuple(range(32, 577, 32))


class ExpertWeights(NamedTuple):
    """The matrices of a bucket: E experts of one width, all in one dtype."""

    gate: Array
    """[E, D, F]"""
    up: Array
    """[E, D, F]"""
    down: Array
    """[E, F, D]"""


@jax.custom_vjp
def routed_swiglu(
    tokens: Float[Array, "T D"],
    combine_weights: Float[Array, "T K"],
    plan: Plan,
    buckets: tuple[ExpertWeights, ...],
) -> Float[Array, "T D"]:
    """The experts' outputs for each token, weighed and summed.

    Args:
      tokens: [T, D], float32 or bfloat16.
      combine_weights: float32 [T, K].
      plan: of the tokens' expert ids.
      buckets: the experts' weights, numbered through the buckets in order; in the dtype of `tokens`, or in float32, to
        be rounded to it where they are used: that saves passes over all of them, and their gradient stays float32.

    Returns:
      [T, D] in the dtype of `tokens`; products and sums are accumulated in float32.
    """
    return forward(tokens, combine_weights, plan, buckets)[0]


def forward(
    tokens: Float[Array, "T D"],
    combine_weights: Float[Array, "T K"],
    plan: Plan,
    buckets: tuple[ExpertWeights, ...],
) -> tuple[Float[Array, "T D"], Float[Array, "R F"], Float[Array, "R F"]]:
    """`routed_swiglu`, and the gate and up projections of the sorted rows, which `backward` wants: F of the widest,
    R = T·K and a block more."""
    return lax.platform_dependent(
        tokens, combine_weights, plan, buckets, cpu=_blocked_forward, default=_grouped_forward
    )


def backward(
    tokens: Float[Array, "T D"],
    combine_weights: Float[Array, "T K"],
    plan: Plan,
    buckets: tuple[ExpertWeights, ...],
    gate: Float[Array, "R F"],
    up: Float[Array, "R F"],
    d_out: Float[Array, "T D"],
) -> tuple[Float[Array, "T D"], Float[Array, "T K"], tuple[ExpertWeights, ...]]:
    """Gradients to tokens, combine weights and buckets, from the arguments and results of `forward`."""
    return lax.platform_dependent(
        tokens, combine_weights, plan, buckets, gate, up, d_out, cpu=_blocked_backward, default=_grouped_backward
    )


def _forward(*inputs):
    out, gate, up = forward(*inputs)
    return out, (*inputs, gate, up)


def _backward(residuals, d_out):
    tokens, combine_weights, plan, buckets, gate, up = residuals
    d_tokens, d_combine_weights, d_buckets = backward(tokens, combine_weights, plan, buckets, gate, up, d_out)
    return d_tokens, d_combine_weights, None, d_buckets


routed_swiglu.defvjp(_forward, _backward)


def _sizes(slots, buckets):
    """The block sizes worth compiling for this many slots; half of them if each bucket has its own."""
    sizes = BLOCKS if len(buckets) == 1 else BLOCKS[1::2]
    return [size for i, size in enumerate(sizes) if i == 0 or size <= slots]


def _sorted_rows(combine_weights, plan):
    """Token and combine weight of each sorted row."""
    return plan.order // combine_weights.shape[1], combine_weights.reshape(-1)[plan.order]


def _with_a_block(of_rows, plan, buckets):
    """With the rows of a block more, which belong to no expert."""
    return tuple(jnp.pad(x, ((0, _sizes(plan.order.size, buckets)[-1]),) + ((0, 0),) * (x.ndim - 1)) for x in of_rows)


def _by_token(plan, d_rows, d_row_weights):
    """Gradients of tokens and combine weights from those of the sorted rows."""
    return sum_slots(d_rows, plan.inverse, plan.used), jnp.where(plan.used, d_row_weights[plan.inverse], 0)


def _widest(buckets):
    return max(bucket.gate.shape[2] for bucket in buckets)


# CPU: a loop over experts, within it over blocks of the expert's rows. An expert's last block may reach into the next
# one's rows; what it writes there is overwritten, since rows are visited in ascending order.


def _visit(sizes: list[int], start: Array, end: Array, body: Callable[[int, Array, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(size, first_row, carry)` over as few blocks as cover the rows from `start` to `end`: they are
    all of one size, the smallest that suffices."""
    blocks = -(-(end - start) // sizes[-1])
    even = -(-(end - start) // jnp.maximum(blocks, 1))
    for smaller, size in pairwise([0, *sizes]):
        count = jnp.where((smaller < even) & (even <= size), blocks, 0)
        block = lambda i, carry, size=size: body(size, start + i * size, carry)  # noqa: E731
        carry = lax.fori_loop(0, count, block, carry)
    return carry


def _bounds(buckets, group_sizes):
    """For each bucket its experts' first rows and ends."""
    ends = jnp.cumsum(group_sizes)
    starts, first = ends - group_sizes, 0
    for bucket in buckets:
        own = slice(first, first + bucket.gate.shape[0])
        yield bucket, starts[own], ends[own]
        first = own.stop


def _stored(array):
    """bfloat16 as bits: to slice or update a bfloat16 array XLA:CPU makes a float32 copy of all of it."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def _loaded(array):
    """The inverse of `_stored`."""
    return lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array


def _matrices(weights, dtype):
    """One expert's matrices in the dtype of the products."""
    return ExpertWeights(*(_loaded(matrix).astype(dtype) for matrix in weights))


def _zeros(shape, dtype, plan, number):
    """Zeros that XLA does not know to be equal to others, which it would make once and copy to where each is used."""
    zero = jnp.minimum(plan.group_sizes[0], -number) + number
    return jnp.full(shape, zero.astype(jnp.uint16 if dtype == jnp.bfloat16 else dtype))


def _put(array, start, rows):
    return lax.dynamic_update_slice(array, rows, (start,) + (0,) * (rows.ndim - 1))


def _add(array, e, matrix):
    return _put(array, e, lax.dynamic_slice_in_dim(array, e, 1) + matrix[None])


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _dot_transposed(a, b):
    """a · bᵀ"""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _transpose(rows, inside):
    """The transpose, zero for columns not `inside`. Without the selection and the barrier XLA:CPU would fold it into
    the product that follows, which has no fast path for a transposed left factor."""
    return lax.optimization_barrier(jnp.where(inside[None, :], rows.T, 0))


def _blocked_forward(tokens, combine_weights, plan, buckets):
    dtype, sizes = tokens.dtype, _sizes(plan.order.size, buckets)
    of_row = _with_a_block(_sorted_rows(combine_weights, plan), plan, buckets)
    carry = jnp.zeros(tokens.shape), *(_zeros((of_row[0].size, _widest(buckets)), dtype, plan, i) for i in (0, 1))
    tokens, buckets = jax.tree.map(_stored, (tokens, buckets))
    for bucket, starts, ends in _bounds(buckets, plan.group_sizes):

        def expert(carry, of_expert):
            weights, start, end = of_expert
            weights = _matrices(weights, dtype)

            def block(size, start, carry):
                out, gates, ups = carry
                token, weight = (lax.dynamic_slice_in_dim(a, start, size) for a in of_row)
                x = _loaded(tokens.at[token].get(mode="clip"))
                gate, up = _dot(x, weights.gate).astype(dtype), _dot(x, weights.up).astype(dtype)
                hidden = weight[:, None] * jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
                inside = (start + jnp.arange(size) < end)[:, None]
                rows = jnp.where(inside, _dot(hidden.astype(dtype), weights.down), 0)
                out = out.at[token].add(rows, mode="promise_in_bounds")
                return out, _put(gates, start, _stored(gate)), _put(ups, start, _stored(up))

            return _visit(sizes, start, end, block, carry), None

        carry, _ = lax.scan(expert, carry, (bucket, starts, ends))
    out, gates, ups = carry
    return out.astype(dtype), _loaded(gates), _loaded(ups)


def _blocked_backward(tokens, combine_weights, plan, buckets, gates, ups, d_out):
    dtype, D, R, sizes = tokens.dtype, tokens.shape[1], gates.shape[0], _sizes(plan.order.size, buckets)
    of_row = _with_a_block(_sorted_rows(combine_weights, plan), plan, buckets)
    weight_dtype = buckets[0].gate.dtype
    tokens, buckets, gates, ups, d_out = jax.tree.map(_stored, (tokens, buckets, gates, ups, d_out))
    d_rows, d_row_weights, d_buckets = _zeros((R, D), dtype, plan, 0), jnp.zeros(R), []
    for bucket, starts, ends in _bounds(buckets, plan.group_sizes):
        F = bucket.gate.shape[2]

        def expert(carry, of_expert, F=F):
            e, weights, start, end = of_expert
            weights = _matrices(weights, dtype)

            def block(size, start, carry):
                d_rows, d_row_weights, d_bucket, d_down = carry
                inside = start + jnp.arange(size) < end
                token, weight = (lax.dynamic_slice_in_dim(a, start, size) for a in of_row)
                weight = weight[:, None]
                x = _loaded(tokens.at[token].get(mode="clip"))
                # Masked, here and where it is transposed: what lies past the expert's rows may be NaN.
                dy = _loaded(d_out.at[token].get(mode="clip"))
                gate, up = (
                    _loaded(lax.dynamic_slice(a, (start, 0), (size, F))).astype(jnp.float32) for a in (gates, ups)
                )

                sigmoid = jax.nn.sigmoid(gate)
                silu = gate * sigmoid
                d_weighted = _dot_transposed(dy, weights.down)
                hidden = silu * up
                d_weight = jnp.sum(d_weighted * hidden, axis=1)
                d_hidden = weight * d_weighted
                d_gate = jnp.where(inside[:, None], d_hidden * up * (sigmoid + silu * (1 - sigmoid)), 0).astype(dtype)
                d_up = jnp.where(inside[:, None], d_hidden * silu, 0).astype(dtype)
                d_x = _dot_transposed(d_gate, weights.gate) + _dot_transposed(d_up, weights.up)

                x_transposed = _transpose(x, inside)
                dy_transposed = _transpose(dy, inside)
                weighted = jnp.where(inside[:, None], weight * hidden, 0).astype(dtype)
                d_bucket = ExpertWeights(
                    _add(d_bucket.gate, e, _dot(x_transposed, d_gate)),
                    _add(d_bucket.up, e, _dot(x_transposed, d_up)),
                    d_bucket.down,
                )
                d_down += lax.optimization_barrier(_dot(dy_transposed, weighted)).T
                d_rows = _put(d_rows, start, _stored(d_x.astype(dtype)))
                return d_rows, _put(d_row_weights, start, d_weight), d_bucket, d_down

            d_down = _zeros(weights.down.shape, jnp.float32, plan, 1)
            d_rows, d_row_weights, d_bucket, d_down = _visit(sizes, start, end, block, (*carry, d_down))
            return (d_rows, d_row_weights, d_bucket._replace(down=_put(d_bucket.down, e, d_down[None]))), None

        d_bucket = ExpertWeights(*(_zeros(w.shape, jnp.float32, plan, i) for i, w in enumerate(bucket, start=2)))
        carry = d_rows, d_row_weights, d_bucket
        experts = jnp.arange(starts.shape[0]), bucket, starts, ends
        (d_rows, d_row_weights, d_bucket), _ = lax.scan(expert, carry, experts)
        d_buckets.append(jax.tree.map(lambda d: d.astype(weight_dtype), d_bucket))
    return *_by_token(plan, _loaded(d_rows), d_row_weights), tuple(d_buckets)


# Elsewhere: whole arrays of rows, of which grouped_matmul makes zeros where they belong to no expert of the bucket.


def _hidden(group_sizes, rows, buckets):
    """Gate and up projections of all buckets, [R, F of the widest]; the narrower fill the first columns."""
    first, F = 0, _widest(buckets)
    gate, up = (jnp.zeros((rows.shape[0], F), rows.dtype) for _ in range(2))
    for bucket in buckets:
        pad = ((0, 0), (0, F - bucket.gate.shape[2]))
        gate += jnp.pad(grouped_matmul(rows, rounded(bucket.gate, rows.dtype), group_sizes, first), pad)
        up += jnp.pad(grouped_matmul(rows, rounded(bucket.up, rows.dtype), group_sizes, first), pad)
        first += bucket.gate.shape[0]
    return gate, up


def _outputs(group_sizes, gate, up, weight, buckets):
    hidden = weight[:, None] * jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    hidden, first = hidden.astype(gate.dtype), 0
    rows: Any = jnp.zeros((hidden.shape[0], buckets[0].down.shape[2]), hidden.dtype)
    for bucket in buckets:
        rows += grouped_matmul(
            hidden[:, : bucket.down.shape[1]], rounded(bucket.down, hidden.dtype), group_sizes, first
        )
        first += bucket.down.shape[0]
    return rows


def _grouped_forward(tokens, combine_weights, plan, buckets):
    token, weight = _sorted_rows(combine_weights, plan)
    gate, up = _hidden(plan.group_sizes, tokens[token], buckets)
    rows = _outputs(plan.group_sizes, gate, up, weight, buckets)
    gate, up = _with_a_block((gate, up), plan, buckets)
    return sum_slots(rows, plan.inverse, plan.used), gate, up


def _grouped_backward(tokens, combine_weights, plan, buckets, gate, up, d_out):
    """By the derivatives of the two halves; of their values XLA computes only what these need."""
    token, weight = _sorted_rows(combine_weights, plan)
    gate, up = gate[: token.size], up[: token.size]
    _, pullback = jax.vjp(partial(_outputs, plan.group_sizes), gate, up, weight, buckets)
    d_gate, d_up, d_weight, d_down = pullback(d_out[token])
    # After the above, lest the rows be kept for so long where the forward pass is repeated just before.
    token, d_gate = lax.optimization_barrier((token, d_gate))
    _, pullback = jax.vjp(partial(_hidden, plan.group_sizes), tokens[token], buckets)
    d_rows, d_gate_up = pullback((d_gate, d_up))
    return *_by_token(plan, d_rows, d_weight), jax.tree.map(jnp.add, d_down, d_gate_up)
