"""Memory of this machine: what this process holds, and what is free."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Memory that this process holds now, its libraries included; 0 where nobody says."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> int | None:
    """Memory free on the device, or on this machine; ``None`` where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        [line] = [line for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    return int(line.split()[1]) * 1024
