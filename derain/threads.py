"""Map a function over many items on threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_CHUNK = 64
"""Largest number of items in a chunk, which a thread processes in one task."""

MIN_CHUNKS = 256
"""Smallest number of chunks, if there are as many items: with few chunks, some threads would end long before others."""


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the result of a function for each item, in the order of the items.

    Args:
        function: Function that spends most of its time without Python's global lock, for example reading files.
        items: Arguments of the function.

    Example:
        >>> list(map_in_threads(str, [1, 2, 3]))
        ['1', '2', '3']
    """
    size = max(1, min(MAX_CHUNK, len(items) // MIN_CHUNKS))
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor() as threads:
        for results in threads.map(lambda chunk: [function(item) for item in chunk], chunks):
            yield from results
