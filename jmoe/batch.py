"""One batch of packed rows: what the data pipeline yields and the train step takes."""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax.Array in the step


class Batch(NamedTuple):
    """Rows of packed documents, [B, S] each.

    Attention stays within a segment, positions count from 0 within it, and `segment_ids == 0` marks padding, which
    takes no part in any loss or statistic.
    """

    tokens: Array
    """int32 [B, S]: input ids."""
    targets: Array
    """int32 [B, S]: the id that follows each input; 0 where `loss_mask` is False."""
    segment_ids: Array
    """int32 [B, S]: 1, 2, ... per document within a row; 0 for padding."""
    positions: Array
    """int32 [B, S]: place within the segment; 0 for padding."""
    loss_mask: Array
    """bool [B, S]: True where the target is the next token of the same document."""
