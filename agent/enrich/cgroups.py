"""From a cgroup's id to its path in the v2 hierarchy, and whether a cgroup that was there has gone.

An id is the inode number of the cgroup's folder, and is never given again. open_by_handle_at(2) would tell the path
of one id, but needs CAP_DAC_READ_SEARCH; a walk needs nothing. Its cost is bounded: so many folders, and a tenth of
the time at most.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from udpwatch.agent.enrich.cache import Cache
from udpwatch.agent.kernel.cgroup import ROOT_ID

MAX_CGROUPS = 8192
MAX_DEPTH = 32
_UP = re.compile(r"^(/\.\.)+(?=/|$)")
_FOREVER = float("inf")
_REST = 9  # after a walk, the next one waits so many times as long as it took


class Cgroups:
    """The tree below a mount of cgroup v2; without one every answer is a miss."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._paths: Cache[int, str] = Cache(MAX_CGROUPS, _FOREVER)  # "": gone before it was seen
        self._seen: Cache[str, bool] = Cache(MAX_CGROUPS, _FOREVER)
        self._next_walk = -_FOREVER

    def path(self, number: int, now: float) -> str:
        """The path of a cgroup, also of one that has gone since the last walk; "": not known. ``now``: monotonic."""
        found = self._paths.get(number, now)
        if found is not None or not number or not self._root or now < self._next_walk:
            return found or ""
        begun = time.monotonic()
        whole = self._walk(self._root, now)
        self._next_walk = now + _REST * (time.monotonic() - begun)
        found = self._paths.get(number, now)
        if found is None and whole:  # an id is not given again: it will not come back
            self._paths.put(number, "", now)
        return found or ""

    def is_at(self, number: int, path: str, now: float) -> bool:
        """Whether a path that a process gives as its own is that of the cgroup with this id. ``now``: monotonic.

        True also where nothing is known to compare it with: no id, or no mount of cgroup v2.
        """
        if not number or not self._root:
            return True
        if "/.." not in path:
            with contextlib.suppress(OSError, ValueError):
                return (self._root / path.lstrip("/")).stat().st_ino == number
        # As seen from another cgroup namespace, or below another root: it ends as the true one does.
        known = self.path(number, now)
        seen = _UP.sub("", path)
        return bool(known) and (known.endswith(seen) or seen.endswith(known))

    def _walk(self, root: Path, now: float) -> bool:
        """Note every cgroup; False where there are too many of them."""
        known = 0
        try:
            if root.stat().st_ino == ROOT_ID:  # else it is a part of the tree, and not for us to say which
                self._paths.put(ROOT_ID, "/", now)
            for number, path in _folders(root, "", 0):
                known += 1
                if known >= MAX_CGROUPS:
                    return False
                self._paths.put(number, path, now)
        except OSError:
            return False
        return True

    def watch(self, path: str, now: float) -> None:
        """Remember that a cgroup was there, if it was."""
        if self._children(path) is not None:
            self._seen.put(path, True, now)

    def gone(self, path: str, now: float, when_empty: bool = False) -> bool:
        """Whether a cgroup that `watch` saw is there no more, or has no other cgroup in it any more if that is asked.

        One that `watch` never saw may be somewhere else.
        """
        if not self._seen.get(path, now):
            return False
        children = self._children(path)
        return children is None or (when_empty and children == 0)

    def _children(self, path: str) -> int | None:
        """How many cgroups are in this one, None where there is no such one: each is a link to it (kernfs)."""
        if not self._root or "/.." in path or "\0" in path:
            return None
        try:
            return (self._root / path.lstrip("/")).stat().st_nlink - 2
        except OSError:
            return None


def _folders(root: Path, above: str, depth: int) -> Iterator[tuple[int, str]]:
    """Every folder below one, with its inode number."""
    if depth > MAX_DEPTH:
        return
    try:
        with os.scandir(f"{root}{above}") as entries:
            names = [(entry.inode(), entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # it went meanwhile
        return
    for number, name in names:
        yield number, f"{above}/{name}"
        yield from _folders(root, f"{above}/{name}", depth + 1)
