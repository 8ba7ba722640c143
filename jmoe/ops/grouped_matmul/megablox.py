"""For TPU: megablox, the Pallas kernels that come with JAX, which visit the tiles that hold rows of the bucket.

`gmm` leaves rows that it does not visit unwritten, so they are masked here. `tgmm` masks what it reads, and writes
zeros for an empty group. Under `jax.shard_map` both need `check_vma=False`: they do not say how their outputs vary.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Of each kernel the rows of a tile, to choose from, the part of a mean group that they may be, and the bytes of its
# contracted features: gmm's weights stay where they are from one tile of a group to the next if they are whole; tgmm
# holds a float32 sum of them. They fit the 16 MiB of VMEM a kernel gets by default, with every operand buffered twice.
GMM, TGMM = ((128, 256), 16, 4096), ((128, 256, 512), 8, 2048)
COLUMNS = 1024


def multiply(rows, weights, group_sizes, first_group, transposed):
    contraction, columns = weights.shape[:0:-1] if transposed else weights.shape[1:]
    tiles = _tiles(GMM, rows, group_sizes, contraction, columns)
    out = gmm(
        _pad(rows, tiles[0]),
        weights,
        group_sizes,
        rows.dtype,
        tiles,
        jnp.int32(first_group),
        transpose_rhs=transposed,
    )
    start = group_sizes[:first_group].sum()
    end = start + group_sizes[first_group : first_group + weights.shape[0]].sum()
    row = jnp.arange(rows.shape[0])
    return jnp.where(((start <= row) & (row < end))[:, None], out[: rows.shape[0]], 0)


def weight_gradient(rows, d_out, group_sizes, first_group, bucket):
    tiles = _tiles(TGMM, rows, group_sizes, rows.shape[1], d_out.shape[1])
    return tgmm(
        _pad(rows, tiles[0]).T,  # tgmm transposes it back
        _pad(d_out, tiles[0]),
        group_sizes,
        rows.dtype,
        tiles,
        jnp.int32(first_group),
        bucket,
    )


def kernel_flops(name: str, operands: Sequence[tuple[str, tuple[int, ...]]]) -> float:
    """FLOPs of one run of a kernel by its name in a compiled program and its operands' dtypes and shapes: of all tiles
    that it may visit, those that two groups share for both. The kernels tell the compiler less, each row once. Features
    that fill up a tile are not counted."""
    offsets, visits, *_ = (shape[0] for dtype, shape in operands if dtype == "s32" and len(shape) == 1)
    lhs, rhs = (shape for _, shape in operands[-2:])
    if name.startswith("tgmm"):
        rows = rhs[0]
        matrix = math.prod(lhs) // rows, rhs[1]
    else:
        rows, *_ = lhs
        matrix = rhs[1:]
    groups = offsets - 1
    tile_rows = rows // (visits - groups + 1)
    return 2.0 * visits * tile_rows * math.prod(matrix)


def _tiles(kernel, rows, group_sizes, contraction, columns):
    """Rows, contracted features and columns of a tile.

    A tile that two groups share is visited for both. A sixteenth of a mean group keeps that to about a sixteenth of the
    work, but fewer than 128 rows leave the matrix unit idle.
    """
    choice, part, contraction_bytes = kernel
    most = rows.shape[0] // (part * group_sizes.shape[0])
    tile_rows = max(tile for tile in choice if tile <= max(most, 128))
    return (
        min(tile_rows, _round_up(max(rows.shape[0], 1), 16)),
        _split(contraction, contraction_bytes // rows.dtype.itemsize),
        _split(columns, COLUMNS),
    )


def _split(size, limit):
    """The whole, which may be any size; else parts of nearly equal size, multiples of 128 features."""
    return size if size <= limit else _round_up(-(-size // -(-size // limit)), 128)


def _pad(rows, multiple):
    """With rows that belong to no group, up to a multiple."""
    return jnp.pad(rows, ((0, _round_up(max(rows.shape[0], 1), multiple) - rows.shape[0]), (0, 0)))


def _round_up(size, multiple):
    return -(-size // multiple) * multiple
