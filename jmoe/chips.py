"""What the makers publish of each TPU chip: the one table of it.

Source: Google Cloud's page of each chip (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). They give the
interconnect as the sum of both directions; here it is what a chip can send, half of that.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Of one chip; where a chip is two devices to JAX (tpu7x), each has half."""

    hbm: float
    """capacity [bytes]"""
    flops: float
    """peak of bfloat16 matrix products [FLOP/s]"""
    hbm_bandwidth: float
    """[bytes/s]"""
    ici_bandwidth: float
    """what it can send to its neighbours, all links together [bytes/s]"""
    clock: float
    """what the peak makes of it, at 2 FLOPs for each multiplier: not published [Hz]"""


CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1200e9, 150e9, 1.05e9),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(32 * 2**30, 918e12, 1638e9, 400e9, 1.75e9),
    "tpu7x": Chip(192 * 2**30, 2307e12, 7380e9, 600e9, 2.2e9),
}
