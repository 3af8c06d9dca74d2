"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

PROC, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that are free or can be freed, within the limit of the control group; without Linux, all there is."""
    try:
        lines = dict(line.split(":", 1) for line in PROC.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (FileNotFoundError, KeyError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_of_group()])


def _left_of_group() -> list[int]:
    """What control groups leave (version 2, then 1); empty without a limit. Cached files count as used, although the
    kernel gives their memory back: such as the file that was just copied here."""
    for limit, usage, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            top, used = (CGROUP / limit).read_text().strip(), int((CGROUP / usage).read_text())
        except (FileNotFoundError, PermissionError):
            continue
        return [] if top == "max" else [max(0, int(top) - used + _stated(CGROUP / stat, cached))]
    return []


def _stated(stat: Path, name: str) -> int:
    """A number of a control group's statistics; 0 where there is none."""
    try:
        return int(dict(line.split() for line in stat.read_text().splitlines())[name])
    except (FileNotFoundError, PermissionError, KeyError):
        return 0
