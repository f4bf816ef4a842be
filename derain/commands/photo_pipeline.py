"""Restore many photos: read ahead of the device, restore several at once, write behind it."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from derain.errors import DerainError
from derain.images import Photo
from derain.memory import release_freed_memory

if TYPE_CHECKING:
    from derain.restoration import Explanation, Restorer

Outcome = bool | DerainError | OSError
"""Whether the written metadata contains a location; or the error that prevented the restoration."""

PIXELS_AHEAD = 48_000_000
"""Largest number of pixels of photos that are read, restored or being written at a time; one photo may have more."""

WORKERS = 2
"""Threads that read photos, and threads that write photos: decoding and encoding release Python's lock."""

BATCHES = 4
"""Largest number of batches, or of rounds of threads, that are restored in one call."""


class PhotoPipeline:
    """Restores photos in order, with bounded memory.

    Photos are read on threads ahead of the device. Those that are ready are restored together. Threads behind the
    device write them. If the pipeline is interrupted, files that are being written are completed.

    Args:
        restorer: Restores the photos.
        read: Returns the photo of a file.
        restore: Restores photos of files; returns a result or an error for each.
        write: Writes a restored photo to its target; returns whether its metadata contains a location.
    """

    def __init__(
        self,
        restorer: "Restorer",
        read: Callable[[Path], Photo],
        restore: Callable[[Sequence[Photo], Sequence[Path]], Sequence["Explanation | DerainError"]],
        write: Callable[[Photo, "Explanation", Path], bool],
    ) -> None:
        self.restorer = restorer
        self.read, self.restore, self.write = read, restore, write
        self._readers, self._writers = ThreadPoolExecutor(WORKERS), ThreadPoolExecutor(WORKERS)
        self._reading: deque[tuple[Path, Future[Photo]]] = deque()
        # Outcomes in order, with the number of pixels of the photo while it is written.
        self._writing: deque[tuple[Future[bool] | DerainError | OSError, int]] = deque()
        self._largest: int | None = None
        self._size: tuple[int, ...] = ()

    def run(self, jobs: Mapping[Path, Path]) -> Iterator[Outcome]:
        """Restore photos.

        Args:
            jobs: Output file of each photo.

        Yields:
            The outcome for each photo, in order.

        Raises:
            KeyboardInterrupt: If the user interrupts the command, after the outcomes of all files that are complete.
        """
        remaining = deque(jobs)
        try:
            while remaining or self._reading:
                self._read_ahead(remaining)
                self._restore_group(jobs)
                while self._writing and (self._is_done() or self._pixels_written() > PIXELS_AHEAD // 2):
                    yield self._outcome()
            while self._writing:
                yield self._outcome()
        except KeyboardInterrupt:
            self._stop()
            while self._writing and self._is_done():
                yield self._outcome()
            raise
        finally:
            self._stop()

    def _read_ahead(self, remaining: deque[Path]) -> None:
        """Start to read the next photos, assuming that they are as large as the largest so far."""
        while remaining:
            largest = self._largest or PIXELS_AHEAD
            if self._reading and (len(self._reading) + 1) * largest > PIXELS_AHEAD // 2:
                return
            if len(self._reading) >= self._group_size() + WORKERS:
                return
            source = remaining.popleft()
            self._reading.append((source, self._readers.submit(self.read, source)))

    def _group_size(self) -> int:
        """Return the largest number of photos that are restored in one call, if all have the latest size."""
        at_once = self.restorer.scheduler.images_at_once(*self._size) if self._size else 1
        return BATCHES * at_once

    def _restore_group(self, jobs: Mapping[Path, Path]) -> None:
        """Restore the next photo and those after it that are already read; start to write them."""
        photos: list[Photo] = []
        sources: list[Path] = []
        while self._reading:
            source, reading = self._reading[0]
            if photos and (not reading.done() or len(photos) >= self._group_size()):
                break
            try:
                photo = reading.result()
            except (DerainError, OSError) as error:
                if photos:
                    break  # outcomes keep the order of the files
                self._reading.popleft()
                self._writing.append((error, 0))
                continue
            self._reading.popleft()
            self._note_size(photo)
            photos.append(photo)
            sources.append(source)
        results = self.restore(photos, sources) if photos else []
        for photo, source, result in zip(photos, sources, results, strict=True):
            if isinstance(result, DerainError):
                self._writing.append((result, 0))
            else:
                writing = self._writers.submit(self.write, photo, result, jobs[source])
                self._writing.append((writing, photo.rgb.shape[0] * photo.rgb.shape[1]))

    def _note_size(self, photo: Photo) -> None:
        """Record the size of a photo; release freed memory if it differs from that of the last photo."""
        height, width = photo.rgb.shape[:2]
        if (height, width) != self._size:
            release_freed_memory()  # blocks of another size cannot be reused
        self._size = (height, width)
        self._largest = max(self._largest or 0, height * width)

    def _is_done(self) -> bool:
        """Return whether the outcome of the first file is known."""
        first = self._writing[0][0]
        return not isinstance(first, Future) or (first.done() and not first.cancelled())

    def _pixels_written(self) -> int:
        """Return the number of pixels of photos that are being written, or wait to be."""
        return sum(pixels for _, pixels in self._writing)

    def _outcome(self) -> Outcome:
        """Return the outcome of the first file that is being written, once it is complete."""
        item, _ = self._writing[0]
        try:
            outcome = item.result() if isinstance(item, Future) else item
        except (DerainError, OSError) as error:
            outcome = error
        self._writing.popleft()
        return outcome

    def _stop(self) -> None:
        """Cancel what has not started, and wait for the rest."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
