"""What a container may still take of the host's memory, which /proc/meminfo does not say.

A process that takes more than its control group allows is killed, with no error that could be recorded. So an
experiment asks before it begins.
"""

from __future__ import annotations

from pathlib import Path

# the limit, what is in use, and in memory.stat the part of it that the kernel gives back when asked (page cache)
FILES_V2 = ("memory.max", "memory.current", "inactive_file")
FILES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least that this process's control group, or one above it, has left; None without a limit."""
    if not own.is_file():
        return None
    left = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, files = root, FILES_V2
        elif "memory" in controllers.split(","):
            base, files = root / "memory", FILES_V1
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            left.append(group_free_bytes(group, *files))
            if group == base:
                break
    return min((size for size in left if size is not None), default=None)


def group_free_bytes(folder: Path, limit: str, used: str, given_back: str) -> int | None:
    """What one control group has left; None where it has no limit, or is not shown in this container."""
    if not (folder / limit).is_file():
        return None
    allowed = (folder / limit).read_text().strip()
    if allowed == "max":
        return None
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(0, int(allowed) - int((folder / used).read_text()) + int(stat[given_back]))
