"""What malloc does with freed memory while JAX computes on a CPU."""

import ctypes
import os
import platform
from importlib.metadata import entry_points
from importlib.util import find_spec

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for reuse, in one arena, where JAX will run on a CPU; to be called before it starts.

    XLA:CPU allocates all temporary memory of a step at once and frees it after the step. glibc would give so large a
    block back to the system each time, and the system hands it out again page by page, cleared: about a tenth of a
    step. With an accelerator nothing is changed, since there the host's memory serves data and checkpoints.
    """
    if platform.libc_ver()[0] == "glibc" and _on_cpu():
        libc = ctypes.CDLL(None)
        libc.mallopt(_ARENA_MAX, 1)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)  # never


def _on_cpu():
    """Whether JAX is told to run on the CPU, or no plugin for another platform is installed."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return find_spec("libtpu") is None and not entry_points(group="jax_plugins")
