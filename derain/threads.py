"""Map functions over many items in threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 64
"""Most items that a thread computes at once: handing over an item takes as long as reading a small file."""

CHUNKS = 256
"""Number of chunks below which chunks are smaller, so that all threads end at about the same time."""


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the result of a function for each item, in the order of the items.

    Args:
        function: Function that mostly reads files or releases Python's lock otherwise.
        items: Its arguments.

    Example:
        >>> list(map_in_threads(str, [1, 2, 3]))
        ['1', '2', '3']
    """
    size = max(1, min(CHUNK, len(items) // CHUNKS))
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor() as threads:
        for results in threads.map(lambda chunk: [function(item) for item in chunk], chunks):
            yield from results
