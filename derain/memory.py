"""How much memory there is to use."""

import os
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
