"""Work shared out among threads: for what waits for the disk or computes outside Python."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = 4


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What the function gives for each item, of which it gets several at a time. Raises what it raises."""
    with ThreadPoolExecutor(max_workers=THREADS) as threads:
        return list(threads.map(function, items))
