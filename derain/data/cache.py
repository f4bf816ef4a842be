"""Decoded pixels of a training set: decoded once, in one buffer that all workers (and ranks) share."""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from derain.data.file_hashes import file_hashes
from derain.data.pairs import Pair
from derain.errors import DerainError
from derain.folders import cache_folder
from derain.images import Pixels, image_size, write_whole
from derain.memory import free_memory
from derain.progress import track

CacheMode = Literal["auto", "ram", "disk", "off"]
FORMAT = 2
"""To be raised when the same files would decode to other bytes."""

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux puts shared memory."""

log = logging.getLogger("derain")


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Return a hash of names and file contents of a set: equal where two people have the same images.

    Example:
        >>> fingerprint([]) == fingerprint([])
        True
    """
    files = [path for pair in pairs for path in (pair.rainy, pair.clean) if path is not None]
    whole = hashlib.sha256()
    for pair in pairs:
        whole.update(os.fsencode(f"{pair.name}\0{pair.clean_side}\0"))
    for digest in file_hashes(files):
        whole.update(digest)
    return whole.hexdigest()[:16]


def read_pair(pair: Pair) -> tuple[Pixels, Pixels]:
    """Decodes a pair that must have a clean image.

    Raises:
        DerainError: If it has none, or the pair cannot be read.
    """
    rainy, clean = pair.read()
    if clean is None:
        raise DerainError(f"{pair.rainy}: has no clean image; training needs pairs, `derain predict` does not")
    return rainy, clean


class PixelCache:
    """Pairs of pixels in one contiguous uint8 buffer: rainy, then clean, of each pair.

    A Python list of arrays would be copied into every DataLoader worker page by page, since reference
    counts are written on reading; one buffer is not. On disk it is a memory map, which every rank of a
    machine shares through the system's page cache; in RAM it is shared memory, one copy a rank.

    Args:
        index: ``(n, 3)``: offset of the pair in the buffer, height, width.
        file: The memory-mapped buffer; or
        memory: the buffer in shared memory.
    """

    def __init__(self, index: NDArray[np.int64], file: Path | None = None, memory: torch.Tensor | None = None) -> None:
        self.index, self.file, self.memory = index, file, memory
        self._open()

    def _open(self) -> None:
        if self.file is not None:
            self._pixels: NDArray[np.uint8] = np.memmap(self.file, np.uint8, "r")
        elif self.memory is not None:
            self._pixels = self.memory.numpy()

    def __getstate__(self) -> dict[str, Any]:
        """Workers that are not forked open the same buffer again instead of receiving a copy."""
        return {"index": self.index, "file": self.file, "memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> tuple[Pixels, Pixels]:
        offset, height, width = (int(value) for value in self.index[place])
        pair = self._pixels[offset : offset + 6 * height * width].reshape(2, height, width, 3)
        return pair[0], pair[1]


def decoded_index(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Where each pair will stand in the buffer, from the image files' heads alone.

    Returns:
        ``(n, 3)``: offset, height, width.
    """

    def size(pair: Pair) -> tuple[int, int]:
        height, width = image_size(pair.rainy)
        return (height, width) if pair.clean_side is None else (height, width // 2)

    with ThreadPoolExecutor() as threads:
        sizes = np.array(list(threads.map(size, pairs)), np.int64).reshape(-1, 2)
    ends = np.cumsum(6 * sizes.prod(axis=1))
    return np.column_stack([np.concatenate([[0], ends[:-1]]), sizes]).astype(np.int64)


def open_cache(pairs: Sequence[Pair], mode: CacheMode = "auto", *, folder: Path | None = None) -> PixelCache | None:
    """Open the cache of these pairs, decoding them first if nobody has yet.

    Args:
        pairs: Pairs with a clean image each.
        mode: ``disk`` (memory map), ``ram`` (shared memory, or ``disk`` with a warning if ``/dev/shm`` is too
            small), ``off``, or ``auto``: on disk when it takes at most half of the free space, else in RAM when it
            takes at most half of the free memory, else off. The size is estimated from the files' heads and logged
            first.
        folder: Where the memory maps are saved; ``cache_folder()`` by default.

    Returns:
        The cache, or None when it is off.

    Raises:
        DerainError: If an image cannot be read, or the pixels do not fit where they are to be saved.
    """
    if mode == "off" or not pairs:
        return None
    folder = (folder or cache_folder()) / "pixels"
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / f"{fingerprint(pairs)}-v{FORMAT}"
    index_file = ready.with_name(f"{ready.name}.npy")
    index = np.load(index_file) if ready.exists() and index_file.exists() else decoded_index(pairs)
    need = int((6 * index[:, 1] * index[:, 2]).sum())
    disk, memory, shared = shutil.disk_usage(folder).free, free_memory(), _free_shared_memory()
    asked = mode
    if mode == "auto":
        mode = "disk" if ready.exists() or need <= disk / 2 else "ram" if need <= min(memory, shared) / 2 else "off"
    if mode == "ram" and need > memory:
        other = "disk or off" if need <= disk else "off"
        raise DerainError(f"--data.cache ram: {need / 1e9:.2f} GB do not fit into memory; use {other}")
    pixels = _shared(need) if mode == "ram" else None
    if mode == "ram" and pixels is None:
        mode = "disk" if asked == "ram" else "off"  # auto: the disk is too full
        log.warning(
            "--data.cache %s: %.2f GB do not fit into %s, which has %.2f GB free; using %s",
            *(asked, need / 1e9, SHARED_MEMORY, shared / 1e9, mode),
        )
    where = {"disk": str(ready), "ram": "shared memory", "off": "nowhere: too little disk and memory"}[mode]
    log.info("pixel cache: %d pairs, %.2f GB decoded, saved in %s", len(pairs), need / 1e9, where)
    if mode == "off":
        return None
    if pixels is not None:
        _decode(pairs, index, pixels.numpy())
        return PixelCache(index, memory=pixels)
    # One process decodes; the lock of one that dies is freed by the system, and only a whole file is renamed.
    with FileLock(f"{ready}.lock"):
        if not ready.exists():
            if need > disk:
                full = f"{folder}, which has {disk / 1e9:.2f} GB free"
                if asked == "ram":
                    full = f"{SHARED_MEMORY}, which has {shared / 1e9:.2f} GB free, nor into {full}"
                other = "ram or off" if asked != "ram" and need <= min(memory, shared) else "off"
                raise DerainError(f"--data.cache {asked}: {need / 1e9:.2f} GB do not fit into {full}; use {other}")
            for left_over in folder.glob(f".*-{ready.name}*"):
                left_over.unlink()
            with write_whole(ready) as temporary:
                buffer = np.memmap(temporary, np.uint8, "w+", shape=(need,))
                _decode(pairs, index, buffer)
                buffer.flush()
        if not index_file.exists():
            with write_whole(index_file) as temporary, temporary.open("wb") as file:
                np.save(file, index)
    return PixelCache(index, file=ready)


def _free_shared_memory() -> int:
    """Return the bytes that shared memory can take: on Linux a file system, often of 64 MB in a container."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else free_memory()


def _shared(size: int) -> torch.Tensor | None:
    """Return a buffer in shared memory, or None where it does not fit: other ranks may take their copies meanwhile."""
    if size > _free_shared_memory():
        return None
    buffer = torch.empty(size, dtype=torch.uint8)
    try:
        buffer.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return buffer


def _decode(pairs: Sequence[Pair], index: NDArray[np.int64], pixels: NDArray[np.uint8]) -> None:
    """Fills the buffer."""

    def decode(place: int) -> None:
        rainy, clean = read_pair(pairs[place])
        offset, height, width = (int(value) for value in index[place])
        size = 3 * height * width
        pixels[offset : offset + size] = rainy.reshape(-1)
        pixels[offset + size : offset + 2 * size] = clean.reshape(-1)

    with ThreadPoolExecutor() as threads:
        done = threads.map(decode, range(len(pairs)))
        for _ in track(done, "Decoding", len(pairs)):
            pass
