"""Pixel cache: images are decoded once, into one buffer that all DataLoader workers share."""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from derain.data.file_hashes import file_hashes
from derain.data.pairs import Pair
from derain.data.shards import is_remote
from derain.errors import DerainError
from derain.folders import cache_folder
from derain.images import Pixels, write_whole
from derain.memory import free_memory
from derain.progress import track
from derain.threads import map_in_threads

CacheMode = Literal["auto", "ram", "disk", "off"]
CACHE_VERSION = 2
"""Increment when a change makes the same files decode to different bytes."""

SHARED_MEMORY = Path("/dev/shm")
"""File system of shared memory on Linux."""

log = logging.getLogger("derain")


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Return a hash (16 hexadecimal digits) of the names, clean halves and file contents of pairs, in order.

    The folders of the files matter only if they are part of the names.

    Raises:
        FileNotFoundError: If a file does not exist.

    Example:
        >>> len(fingerprint([]))
        16
    """
    files = [path for pair in pairs for path in (pair.rainy, pair.clean) if path is not None]
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(os.fsencode(f"{pair.name}\0{pair.clean_side}\0"))
    for file_digest in file_hashes(files):
        digest.update(file_digest)
    return digest.hexdigest()[:16]


def read_pair(pair: Pair) -> tuple[Pixels, Pixels]:
    """Read the rainy and the clean image of a training pair.

    Returns:
        Rainy and clean pixels, ``(h, w, 3)`` in 0 to 255 each.

    Raises:
        DerainError: If there is no clean image, or the pair cannot be read.
    """
    rainy, clean = pair.read()
    if clean is None:
        raise DerainError(
            f"{pair.rainy}: no clean image, which training needs; remove the file, or use another data set"
        )
    return rainy, clean


class PixelCache:
    """Pixels of image pairs in one contiguous uint8 buffer.

    For each pair, the buffer contains the rainy image, then the clean one; with ``paired=False``, rainy images only.
    On disk it is a memory map, which all ranks of a machine share through the page cache. In RAM it is shared memory,
    with one copy per rank. Loader processes open the buffer instead of copying it, even if they are spawned.

    Args:
        index: ``(n, 3)``: offset of each pair in the buffer in bytes, and height and width of its images.
        file: File with the buffer, to be memory-mapped; give either ``file`` or ``memory``.
        memory: Buffer in shared memory, one-dimensional uint8.
        paired: Whether the buffer contains clean images.
    """

    def __init__(
        self,
        index: NDArray[np.int64],
        file: Path | None = None,
        memory: torch.Tensor | None = None,
        *,
        paired: bool = True,
    ) -> None:
        self.index, self.file, self.memory, self.paired = index, file, memory, paired
        self._open()

    def _open(self) -> None:
        if self.file is not None:
            self._pixels: NDArray[np.uint8] = np.memmap(self.file, np.uint8, "r")
        elif self.memory is not None:
            self._pixels = self.memory.numpy()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that spawned processes receive; they open the same buffer instead of copying it."""
        return {"index": self.index, "file": self.file, "memory": self.memory, "paired": self.paired}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, pair_index: int) -> tuple[Pixels, Pixels]:
        """Return rainy and clean pixels, ``(h, w, 3)`` in 0 to 255 each, as views of the buffer.

        Without clean images, the rainy pixels are returned twice.
        """
        offset, height, width = (int(value) for value in self.index[pair_index])
        images = 2 if self.paired else 1
        pixels = self._pixels[offset : offset + 3 * images * height * width].reshape(images, height, width, 3)
        return pixels[0], pixels[-1]


def pair_sizes(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Return height and width of the images of each pair, ``(n, 2)``, as `Pair.size` does.

    Raises:
        DerainError: If a rainy image cannot be opened.
    """
    return np.array(list(map_in_threads(Pair.size, pairs)), np.int64).reshape(-1, 2)


def buffer_index(pairs: Sequence[Pair], *, paired: bool = True) -> NDArray[np.int64]:
    """Return the offset of each pair in the buffer and the size of its images, without decoding them.

    Args:
        pairs: The pairs.
        paired: Whether the buffer contains clean images.

    Returns:
        ``(n, 3)``: offset in bytes, height, width.

    Raises:
        DerainError: If a rainy image cannot be opened.
    """
    sizes = pair_sizes(pairs)
    ends = np.cumsum(_bytes_per_pixel(paired) * sizes.prod(axis=1))
    return np.column_stack([np.concatenate([[0], ends[:-1]]), sizes]).astype(np.int64)


def _bytes_per_pixel(paired: bool) -> int:
    """Return the number of bytes for one pixel of each image of a pair."""
    return 6 if paired else 3


@dataclass(frozen=True)
class _Space:
    """Size of the cache, and free space on the disk, in memory and in shared memory, in bytes."""

    need: int
    disk: int
    memory: int
    shared: int

    @property
    def fits_memory(self) -> bool:
        return self.need <= min(self.memory, self.shared)


def open_cache(
    pairs: Sequence[Pair], mode: CacheMode = "auto", *, folder: Path | None = None, paired: bool = True
) -> PixelCache | None:
    """Open the cache of pairs; decode the images first if the cache does not exist.

    Args:
        pairs: Pairs with clean images, or without them if ``paired`` is false.
        mode: ``disk`` (memory map), ``ram`` (shared memory, or ``disk`` with a warning if ``/dev/shm`` is too
            small), ``off``, or ``auto``: on disk if the cache exists there or needs at most half of the free disk
            space; else in RAM if the pixels need at most half of the free memory and at most half of the free
            ``/dev/shm``; else off. ``auto`` creates no cache of shards behind a URL.
        folder: Folder of caches, in whose subfolder ``pixels`` the memory maps are saved; ``cache_folder()`` by
            default.
        paired: Whether the pairs have clean images.

    Returns:
        The cache; None if it is off or there are no pairs.

    Raises:
        DerainError: If a pair cannot be read, or the pixels do not fit on the disk or into memory.
        FileNotFoundError: If an image file does not exist.
    """
    if mode == "off" or not pairs:
        return None
    pixel_folder = (folder or cache_folder()) / "pixels"
    pixel_folder.mkdir(parents=True, exist_ok=True)
    file = pixel_folder / f"{fingerprint(pairs)}-v{CACHE_VERSION}"
    if mode == "auto" and not file.exists() and any(is_remote(pair.rainy) for pair in pairs):
        log.info("pixel cache: off, since shards are read from a URL; --data.cache disk decodes all of them first")
        return None
    index_file = file.with_name(f"{file.name}.npy")
    index = np.load(index_file) if file.exists() and index_file.exists() else buffer_index(pairs, paired=paired)
    need = int((_bytes_per_pixel(paired) * index[:, 1] * index[:, 2]).sum())
    space = _Space(need, shutil.disk_usage(pixel_folder).free, free_memory(), _free_shared_memory())
    requested = mode
    if mode == "auto":
        mode = "disk" if file.exists() else _choose_mode(space)
    if mode == "ram" and need > space.memory:
        alternatives = "disk or off" if need <= space.disk else "off"
        raise DerainError(
            f"--data.cache ram: {need / 1e9:.2f} GB do not fit into memory, which has {space.memory / 1e9:.2f} GB "
            f"free; use {alternatives}"
        )
    buffer = _allocate_shared(need) if mode == "ram" else None
    if mode == "ram" and buffer is None:
        mode = "disk" if requested == "ram" else "off"  # auto chooses RAM only if the disk is too full
        log.warning(
            "--data.cache %s: %.2f GB do not fit into %s, which has %.2f GB free; using %s",
            requested,
            need / 1e9,
            SHARED_MEMORY,
            space.shared / 1e9,
            mode,
        )
    if mode == "off":
        return None
    location = str(file) if mode == "disk" else "shared memory"
    kind = "pairs" if paired else "images"
    log.info("pixel cache: %d %s, %.2f GB decoded, in %s", len(pairs), kind, need / 1e9, location)
    if buffer is not None:
        _decode(pairs, index, buffer.numpy(), paired=paired)
        return PixelCache(index, memory=buffer, paired=paired)
    # One process decodes while the others wait. If it dies, the system frees its lock, and no incomplete file remains
    # under the final name.
    with FileLock(f"{file}.lock"):
        if not file.exists():
            if need > space.disk:
                raise DerainError(_disk_full(requested, pixel_folder, space))
            _write_pixels(pairs, index, file, need, paired=paired)
        if not index_file.exists():
            _write_index(index, index_file)
    return PixelCache(index, file=file, paired=paired)


def _choose_mode(space: _Space) -> CacheMode:
    """Return the mode that ``auto`` selects if there is no cache on disk yet."""
    if space.need <= space.disk / 2:
        return "disk"
    memory = min(space.memory, space.shared)
    if space.need <= memory / 2:
        return "ram"
    log.info(
        "pixel cache: off, since %.2f GB are more than half of the free disk space (%.2f GB), and more than half of "
        "the free memory that processes can share (%.2f GB)",
        space.need / 1e9,
        space.disk / 1e9,
        memory / 1e9,
    )
    return "off"


def _disk_full(requested: CacheMode, folder: Path, space: _Space) -> str:
    """Return the error message for a cache that does not fit on the disk."""
    full = f"{folder}, which has {space.disk / 1e9:.2f} GB free"
    if requested == "ram":
        full = f"{SHARED_MEMORY}, which has {space.shared / 1e9:.2f} GB free, nor into {full}"
    alternatives = "ram or off" if requested != "ram" and space.fits_memory else "off"
    return f"--data.cache {requested}: {space.need / 1e9:.2f} GB do not fit into {full}; use {alternatives}"


def _write_pixels(pairs: Sequence[Pair], index: NDArray[np.int64], file: Path, size: int, *, paired: bool) -> None:
    for unfinished in file.parent.glob(f".*-{file.name}*"):
        unfinished.unlink()
    with write_whole(file) as temporary:
        buffer = np.memmap(temporary, np.uint8, "w+", shape=(size,))
        _decode(pairs, index, buffer, paired=paired)
        buffer.flush()


def _write_index(index: NDArray[np.int64], file: Path) -> None:
    with write_whole(file) as temporary, temporary.open("wb") as opened:
        np.save(opened, index)


def _free_shared_memory() -> int:
    """Return the free bytes of shared memory. In containers, ``/dev/shm`` is often limited to 64 MB."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else free_memory()


def _allocate_shared(size: int) -> torch.Tensor | None:
    """Return a buffer in shared memory; None if it does not fit, for example because other ranks allocated theirs."""
    if size > _free_shared_memory():
        return None
    buffer = torch.empty(size, dtype=torch.uint8)
    try:
        buffer.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return buffer


def _decode(pairs: Sequence[Pair], index: NDArray[np.int64], buffer: NDArray[np.uint8], *, paired: bool) -> None:
    """Decode all pairs into the buffer."""

    def decode(pair_index: int) -> None:
        pair = pairs[pair_index]
        images = read_pair(pair) if paired else pair.read()[:1]
        offset, height, width = (int(value) for value in index[pair_index])
        size = 3 * height * width
        for image in images:
            buffer[offset : offset + size] = image.reshape(-1)
            offset += size

    for _ in track(map_in_threads(decode, range(len(pairs))), "Decoding", len(pairs)):
        pass
