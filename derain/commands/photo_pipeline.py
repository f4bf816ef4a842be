"""Restore many photos: while some are restored together, later ones are read and earlier ones written."""

import errno
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from derain.errors import DerainError
from derain.images import Photo, image_size
from derain.memory import is_out_of_memory, memory_errors, release_freed_memory

if TYPE_CHECKING:
    from derain.restoration import Explanation, Restorer

Outcome = bool | DerainError | OSError
"""Whether the written metadata contains a location; or the error that prevented the restoration."""

PIXELS_AHEAD = 48_000_000
"""Maximum number of pixels of all photos that are read, restored or written at a time; one photo may have more."""

WORKERS = 2
"""Number of threads that read photos; as many other threads write results."""

BATCHES = 4
"""Maximum number of batches that are restored in one call; on a CPU, maximum number of photos for each thread."""

NOT_WRITABLE = {errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Error numbers of a full or read-only disk, after which no file can be written; Windows has no quota error."""


class PhotoPipeline:
    """Restores photos in order, with bounded memory.

    Some threads read photos, others write results. The calling thread restores together the photos that have been read.
    If the pipeline is interrupted, files that are being written are completed.

    Args:
        restorer: Restorer that ``restore`` uses; it determines how many photos are restored in one call.
        read: Returns the photo of a file.
        restore: Restores photos, given the photos and their files; returns a result or an error for each photo.
        write: Writes a result, given the photo, the result and the output file; returns whether the written metadata
            contains a location.
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
        # Files in order, each with its future photo and its number of pixels.
        self._reading: deque[tuple[Path, Future[Photo], int]] = deque()
        # Outcomes in order, each with the number of pixels of the photo to write; 0 for an error.
        self._writing: deque[tuple[Future[bool] | DerainError | OSError, int]] = deque()
        self._size: tuple[int, ...] = ()

    def run(self, jobs: Mapping[Path, Path]) -> Generator[Outcome]:
        """Restore photos; a pipeline runs once.

        Args:
            jobs: Output file of each input file.

        Yields:
            The outcome of each photo, in order.

        Raises:
            KeyboardInterrupt: If the user interrupts the command; the outcomes of all complete files are yielded first.
            OSError: If the disk is full or read-only.
        """
        remaining = deque(jobs)
        try:
            while remaining or self._reading:
                self._read_ahead(remaining)
                self._restore_group(jobs)
                while self._writing and (self._is_done() or self._pixels_to_write() > PIXELS_AHEAD // 2):
                    yield self._pop_outcome()
            while self._writing:
                yield self._pop_outcome()
        except KeyboardInterrupt:
            self._stop()
            while self._writing and self._is_done():
                yield self._pop_outcome()
            raise
        finally:
            self._stop()

    def _read_ahead(self, remaining: deque[Path]) -> None:
        """Start to read photos for the next call: at most half of `PIXELS_AHEAD`, but at least one photo."""
        while remaining and len(self._reading) < self._group_size() + WORKERS:
            pixels = _pixels(remaining[0])
            if self._reading and pixels + sum(item[2] for item in self._reading) > PIXELS_AHEAD // 2:
                return
            source = remaining.popleft()
            self._reading.append((source, self._readers.submit(self._read, source), pixels))

    def _read(self, source: Path) -> Photo:
        with memory_errors(str(source)):
            return self.read(source)

    def _write(self, photo: Photo, result: "Explanation", target: Path) -> bool:
        with memory_errors(str(target)):
            return self.write(photo, result, target)

    def _group_size(self) -> int:
        """Return the largest number of photos that are restored in one call, for the size of the latest photo."""
        at_once = self.restorer.images_at_once(*self._size) if self._size else 1
        return BATCHES * at_once

    def _restore_group(self, jobs: Mapping[Path, Path]) -> None:
        """Restore the next photo, and those after it that have been read already; start to write the results."""
        photos: list[Photo] = []
        sources: list[Path] = []
        while self._reading:
            source, reading, _ = self._reading[0]
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
        results = self._restore(photos, sources) if photos else []
        for photo, source, result in zip(photos, sources, results, strict=True):
            if isinstance(result, DerainError):
                self._writing.append((result, 0))
            else:
                writing = self._writers.submit(self._write, photo, result, jobs[source])
                self._writing.append((writing, photo.rgb.shape[0] * photo.rgb.shape[1]))

    def _restore(self, photos: list[Photo], sources: list[Path]) -> "Sequence[Explanation | DerainError]":
        """Restore photos; if memory does not suffice for all of them together, restore them one by one."""
        try:
            return self.restore(photos, sources)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if len(photos) == 1:
            return [DerainError(f"{sources[0]}: not enough memory; close other programs, or reduce the image")]
        return [self._restore([photo], [source])[0] for photo, source in zip(photos, sources, strict=True)]

    def _note_size(self, photo: Photo) -> None:
        """Record the size of a photo; release freed memory if the last photo had another size."""
        height, width = photo.rgb.shape[:2]
        if (height, width) != self._size:
            release_freed_memory()  # blocks of another size cannot be reused
        self._size = (height, width)

    def _is_done(self) -> bool:
        """Return whether the first outcome is known; false if its writing was cancelled."""
        first = self._writing[0][0]
        return not isinstance(first, Future) or (first.done() and not first.cancelled())

    def _pixels_to_write(self) -> int:
        """Return the number of pixels of photos that are being written or wait for it."""
        return sum(pixels for _, pixels in self._writing)

    def _pop_outcome(self) -> Outcome:
        """Wait for the first outcome, remove it from the queue and return it."""
        item, _ = self._writing[0]
        try:
            outcome = item.result() if isinstance(item, Future) else item
        except (DerainError, OSError) as error:
            outcome = outcome_of(error)
        self._writing.popleft()
        return outcome

    def _stop(self) -> None:
        """Cancel the reads and writes that have not started, and wait for the others."""
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)


def outcome_of(error: DerainError | OSError) -> Outcome:
    """Return an error as the outcome of its file, unless it prevents writing any further file.

    Raises:
        OSError: If the error means that the disk is full or read-only.
    """
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        raise error
    return error


def _pixels(source: Path) -> int:
    """Return the number of pixels of a photo; 0 if the file cannot be opened: reading it reports the error."""
    try:
        height, width = image_size(source)
    except (DerainError, OSError):
        return 0
    return height * width
