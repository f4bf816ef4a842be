"""Free memory, exceptions that mean that memory is insufficient, and settings of glibc's allocator."""

import ctypes
import gc
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from derain.errors import DerainError

CGROUP = Path("/sys/fs/cgroup")
"""Folder with the limits of the container, if the process runs in one (cgroup v2)."""

OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|bad_alloc|[Ff]ailed to allocate|"
    "could not create a (memory|primitive)(?! descriptor)"
)
"""Messages about insufficient memory: of PyTorch (Linux, Windows, Apple GPUs), cuDNN, cuBLAS, oneDNN, onnxruntime."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory is insufficient.

    Example:
        >>> is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
        True
    """
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """Replace exceptions about insufficient memory in a block by a DerainError.

    Args:
        name: Name of the file or image in the message.

    Raises:
        DerainError: If memory is insufficient in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DerainError(f"{name}: not enough memory; close other programs, or reduce the image") from None


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause Python's garbage collector, which slows a block that creates many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def free_memory() -> int:
    """Return the bytes of main memory that can be allocated without swapping, within the limit of a container.

    Example:
        >>> free_memory() > 0
        True
    """
    available = psutil.virtual_memory().available
    limit = _bytes_in(CGROUP / "memory.max")
    used = _bytes_in(CGROUP / "memory.current")
    if limit is None or used is None:
        return int(available)
    return min(int(available), max(1, limit - used))


def _bytes_in(path: Path) -> int | None:
    """Return the number of bytes in a cgroup file; None if the file is missing, or contains "max" (no limit)."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks of freed memory, and PyTorch request large pages from the system (Linux).

    Otherwise, networks spend much time on clearing new pages. The settings apply to the whole process: call this
    function in programs only, not in libraries, and before torch creates a tensor. Without glibc, only the setting of
    PyTorch has an effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def release_freed_memory() -> None:
    """Return freed memory to the system, for example between photos of different sizes; does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
