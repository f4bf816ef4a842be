"""Read, change and write a video at the same time, in three threads with a bounded number of frames between them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from derain.images import Pixels

QUEUE = 4
"""Limit of the frames that are read ahead, and of the frames that wait to be written."""

T = TypeVar("T")


class Packet(NamedTuple):
    """Packet of a stream that is copied.

    Attributes:
        content: PyAV's packet.
        stream_index: Index of its stream in the source.
    """

    content: Any
    stream_index: int


class Frame(NamedTuple):
    """Frame of a video, with the packets of copied streams that precede it.

    Attributes:
        packets: Packets of copied streams between the previous frame and this one.
        pixels: ``(h, w, 3)`` uint8, upright; None in a last item without a frame, whose packets follow the last frame.
        pts: Time in units of the stream's time base; None if unknown.
        duration: Duration in the same units; 0 if unknown.
        seconds: Time in seconds; None if unknown.
    """

    packets: list[Packet]
    pixels: Pixels | None
    pts: int | None = None
    duration: int = 0
    seconds: float | None = None


class Picture(NamedTuple):
    """Frame of a video to change.

    Attributes:
        pixels: ``(h, w, 3)`` uint8, upright.
        name: Number, from 1, and time of the frame, for messages.
    """

    pixels: Pixels
    name: str


Change = Callable[[Iterator[Picture]], Iterator[Pixels]]
"""Function of the frames of a video that yields their changed pixels, of equal size and in the same order.

It may read some frames ahead, to restore a batch or to fuse neighbours.
"""


def overlap(
    frames: Iterable[Frame],
    change: Change,
    write: Callable[[Frame, Pixels | None], None],
) -> None:
    """Change frames, while one thread reads later frames and another one writes earlier frames.

    Memory does not grow with the length of the video: at most `QUEUE` frames wait before and after ``change``.

    Args:
        frames: Frames of the source; read in a thread.
        change: Changes the frames; runs in the calling thread.
        write: Writes a frame of the source and its changed pixels (None after the last frame), in order; called in
            another thread.

    Raises:
        RuntimeError: If ``change`` does not yield as many frames as it received.
        Exception: Whatever reading, changing or writing raises; both threads have ended by then.
    """
    with _thread("read") as reader, _thread("write") as writer:
        waiting: deque[Future[None]] = deque()
        sources: deque[Frame] = deque()
        rest: list[Frame] = []

        def pictures() -> Iterator[Picture]:
            for number, frame in enumerate(_ahead(frames, reader), 1):
                if frame.pixels is None:
                    rest.append(frame)
                else:
                    sources.append(frame)
                    time = "" if frame.seconds is None else f" at {frame.seconds:.2f} s"
                    yield Picture(frame.pixels, f"frame {number}{time}")

        for changed in change(pictures()):
            if not sources:
                raise RuntimeError("more frames were changed than read")
            waiting.append(writer.submit(write, sources.popleft(), changed))
            if len(waiting) > QUEUE:
                waiting.popleft().result()
        if sources:
            raise RuntimeError(f"{len(sources)} frames were read, but not changed")
        waiting.extend(writer.submit(write, frame, None) for frame in rest)
        while waiting:
            waiting.popleft().result()


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of one thread; at the end of the block, it finishes its current task and skips the others."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _ahead(items: Iterable[T], thread: ThreadPoolExecutor) -> Iterator[T]:
    """Yield items in order, while a thread reads up to `QUEUE` of them ahead."""
    iterator = iter(items)
    end = object()
    waiting = deque(thread.submit(next, iterator, end) for _ in range(QUEUE))
    while (item := waiting.popleft().result()) is not end:
        waiting.append(thread.submit(next, iterator, end))
        yield item  # type: ignore[misc]
