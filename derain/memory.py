"""How much memory there is to use."""

import ctypes
import os
import platform
from pathlib import Path


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping: free or reclaimable, within a container's limit.

    Example:
        >>> free_memory() > 0
        True
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        told = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(told["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, max(1, int(limit.read_text()) - int(used.read_text())))
    return free


def keep_large_blocks() -> None:
    """Lets glibc reuse large blocks of memory instead of asking the system for fresh pages each time.

    Zeroing pages takes up to 40 % of the time of a network on a large image. Concerns the whole process, so
    only a program of its own may call it; elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def give_back_blocks() -> None:
    """Hands kept blocks back to the system: after one photo, since the next may need blocks of other sizes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
