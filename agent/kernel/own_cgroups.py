"""Find the cgroups of this process that may have limits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


def folders(controller: str, proc: Path = Path("/proc/self")) -> Iterator[Path]:
    """Yield the folders of the process's cgroups that may limit ``controller`` ("cpu", "memory"), in v2 and v1, and of
    their visible parents.
    """
    try:
        mounts = os.fsdecode((proc / "mountinfo").read_bytes()).split("\n")
        cgroups = os.fsdecode((proc / "cgroup").read_bytes()).split("\n")
    except OSError:
        return
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in cgroups if line)}
    for line in mounts:
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            path = paths.get("")
        elif kind.startswith("cgroup ") and controller in kind.split(" ")[-1].split(","):
            path = next((path for names, path in paths.items() if controller in names.split(",")), None)
        else:
            continue
        if path is None:
            continue
        root, point = (_unescaped(word) for word in mount.split(" ")[3:5])
        top = Path(point)
        # A container can see its own cgroup as the root of the mount.
        below = path.removeprefix(root).strip("/") if path.startswith(root) else ""
        folder = top / below if ".." not in below else top
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
