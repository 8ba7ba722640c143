"""The Newton-Schulz iteration that makes a matrix orthogonal, as Muon needs it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe import config
from jmoe.ops.matmul import transposed

Triple = tuple[float, float, float]

# Keller Jordan's: steep at zero, and then the singular values lie between 0.7 and 1.2 rather than at 1.
STANDARD: Triple = (3.4445, -4.7750, 2.0315)

# The best odd quintics one after another, for singular values from 1e-3 to 1 (arXiv 2505.16932, Algorithm 1); all but
# the last are tempered by 1.01, for what bfloat16 rounds beyond 1.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
POLAR_EXPRESS = (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS[:-1]), _POLAR_EXPRESS[-1])


def coefficients(optim: config.Muon) -> tuple[Triple, ...]:
    """(a, b, c) of each step of the iteration."""
    if optim.coefficients == "standard":
        return (STANDARD,) * optim.iterations
    return tuple(POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)] for step in range(optim.iterations))


def orthogonalise(x: Float[Array, "A B"], triples: Sequence[Triple]) -> Float[Array, "A B"]:
    """The orthogonal matrix nearest to `x`, or about: X ← aX + (bXXᵀ + c(XXᵀ)²)X from X = x/‖x‖, for each (a, b, c).

    Products are of the dtype of `x`, which is that of the result, and summed in float32. XXᵀ is of the smaller side.
    A matrix of zeros stays one.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.T, triples).T
    wide = x.astype(jnp.float32)
    x = (wide / (jnp.sqrt(jnp.sum(wide * wide)) + 1e-20)).astype(x.dtype)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def step(x, triple):
        a, b, c = triple
        gram = product(x, transposed(x))
        gram_low = gram.astype(x.dtype)
        polynomial = b * gram + c * product(gram_low, gram_low)
        return (a * x.astype(jnp.float32) + product(polynomial.astype(x.dtype), x)).astype(x.dtype), None

    return lax.scan(step, x, jnp.array(triples, jnp.float32))[0]


def orthogonalise_each(x: Float[Array, "M A B"], triples: Sequence[Triple]) -> Float[Array, "M A B"]:
    """`orthogonalise` for each of M matrices: one after another on CPU, where products of stacks are slow."""
    each = partial(orthogonalise, triples=triples)
    return lax.platform_dependent(x, cpu=partial(lax.map, each), default=jax.vmap(each))
