"""For TPU: megablox, the Pallas kernels that come with JAX, which visit the tiles that hold rows of the bucket.

`gmm` leaves rows that it does not visit unwritten, so they are masked here. `tgmm` masks what it reads, and writes
zeros for an empty group. Under `jax.shard_map` both need `check_vma=False`: they do not say how their outputs vary.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Largest tiles that fit the 16 MiB of VMEM a kernel gets by default, with every operand buffered twice.
ROWS, CONTRACTION_BYTES, COLUMNS = 512, 2048, 1024


def multiply(rows, weights, group_sizes, first_group, transposed):
    contraction, columns = weights.shape[:0:-1] if transposed else weights.shape[1:]
    tiles = _tiles(rows, group_sizes, contraction, columns)
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
    tiles = _tiles(rows, group_sizes, rows.shape[1], d_out.shape[1])
    return tgmm(
        _pad(rows, tiles[0]).T,  # tgmm transposes it back
        _pad(d_out, tiles[0]),
        group_sizes,
        rows.dtype,
        tiles,
        jnp.int32(first_group),
        bucket,
    )


def _tiles(rows, group_sizes, contraction, columns):
    """Rows, contracted features and columns of a tile.

    A tile that two groups share is visited for both. A quarter of a mean group keeps that to about a quarter of the
    work, but fewer than 128 rows leave the matrix unit idle.
    """
    quarter = rows.shape[0] // (4 * group_sizes.shape[0])
    tile_rows = max(tile for tile in (128, 256, ROWS) if tile <= max(quarter, 128))
    return (
        min(tile_rows, _round_up(max(rows.shape[0], 1), 16)),
        _split(contraction, CONTRACTION_BYTES // rows.dtype.itemsize),
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
