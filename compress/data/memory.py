"""How much memory there is for images."""

import os
from pathlib import Path

import torch

# Images take at most this share of the free memory, of the GPU if they are to lie there; beyond it they stay on disk.
MEMORY_SHARE = 0.5
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """The free memory of the GPU `device`, or that which this process can still get, within the limit of a container.

    Where the system does not say what is free (only Linux does), half of what there is.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        return min(free, limit - used + int(cached))
    except (OSError, KeyError, ValueError):  # no container, or no limit: "max"
        return free
