"""Map a cgroup id to its path in the v2 hierarchy, and detect when a cgroup is removed.

The id is the inode number of the cgroup's directory; the kernel never reuses it. open_by_handle_at(2) would resolve a
single id but requires CAP_DAC_READ_SEARCH. Walking the tree requires no capability.

Rules
1. A walk records at most MAX_CGROUPS cgroups. Walks take at most a tenth of the time.
2. Each subtree gets a share of MAX_CGROUPS, whatever the size of the others: after a directory's own children are
   recorded, the remaining room is divided equally among their subtrees. Small subtrees leave their unused share to the
   larger ones.
3. Skipped directories are counted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from udpwatch.agent.attribution.cache import TtlCache
from udpwatch.agent.attribution.container import MAX_PATH
from udpwatch.agent.kernel.cgroup import ROOT_ID

MAX_CGROUPS = 8192
MAX_DEPTH = 32
_UP = re.compile(r"^(/\.\.)+(?=/|$)")
_FOREVER = float("inf")
_REMOVED = errno.ENOENT, errno.ENODEV
_REST = 9  # the pause after a walk, in multiples of the walk's duration


@dataclass(frozen=True, slots=True)
class _Folder:
    """A cgroup whose children are to be recorded."""

    root: str
    path: str  # relative to the root
    children: int
    recorded: int = 0  # children recorded so far


class Cgroups:
    """The tree below a mount of cgroup v2. Without a mount, every lookup returns nothing."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        # Removed cgroups keep their path here. "": the cgroup was removed before a walk saw it.
        self._paths: TtlCache[int, str] = TtlCache(2 * MAX_CGROUPS, _FOREVER)
        self._seen: TtlCache[str, bool] = TtlCache(MAX_CGROUPS, _FOREVER)
        self._next_walk = -_FOREVER
        self.left_out = 0  # directories that walks skipped; their descendants are not counted

    def path(self, cgroup_id: int, now: float) -> str:
        """Return the path of a cgroup, or "" if it is unknown. ``now``: monotonic seconds.

        A cgroup that was removed after the last walk is still found.
        """
        found = self._paths.get(cgroup_id, now)
        if found is not None or not cgroup_id or not self._root or now < self._next_walk:
            return found or ""
        started = time.monotonic()
        complete = self._walk(self._root, now)
        self._next_walk = now + _REST * (time.monotonic() - started)
        found = self._paths.get(cgroup_id, now)
        if found is None and complete:  # ids are never reused, so no later walk can find it either
            self._paths.put(cgroup_id, "", now)
        return found or ""

    def is_at(self, cgroup_id: int, path: str, now: float) -> bool:
        """Return whether a path from /proc/PID/cgroup is the path of this cgroup. ``now``: monotonic seconds.

        Also True if there is nothing to compare: no id, or no mount of cgroup v2.
        """
        if not cgroup_id or not self._root:
            return True
        if "/.." not in path:
            with contextlib.suppress(OSError, ValueError):
                return (self._root / path.lstrip("/")).stat().st_ino == cgroup_id
        # Seen from another cgroup namespace or below another root, the path only ends like the real one.
        known = self.path(cgroup_id, now)
        relative = _UP.sub("", path)
        return bool(known) and (known.endswith(relative) or relative.endswith(known))

    def _walk(self, root: Path, now: float) -> bool:
        """Record every cgroup; return False if some were skipped."""
        before = self.left_out
        try:
            status = root.stat()
        except OSError:
            return False
        if status.st_ino == ROOT_ID:  # any other id means that the mount shows only a part of the tree
            self._paths.put(ROOT_ID, "/", now)
        _, unfinished = self._record(_Folder(f"{root}", "", _below(status)), MAX_CGROUPS - 1, now)
        self.left_out += sum(folder.children - folder.recorded for folder in unfinished)
        return self.left_out == before

    def _record(self, folder: _Folder, share: int, now: float) -> tuple[int, list[_Folder]]:
        """Record at most ``share`` cgroups below a directory.

        Return how many were recorded, and the directories that have more of them.
        """
        if not share:
            return 0, [folder]
        if folder.path.count("/") >= MAX_DEPTH or len(folder.path) >= MAX_PATH:
            self.left_out += folder.children
            return 0, []
        try:
            children = list(islice(_unrecorded(folder), share))
        except OSError as error:
            self.left_out += error.errno not in _REMOVED
            return 0, []
        for cgroup_id, child in children:
            self._paths.put(cgroup_id, child.path, now)
        known = folder.recorded + len(children)
        own = [replace(folder, recorded=known)] if len(children) == share and folder.children > known else []
        parents = [[child] for _, child in children if child.children]
        recorded, unfinished = self._divide(parents, share - len(children), now)
        return len(children) + recorded, own + unfinished

    def _divide(self, subtrees: list[list[_Folder]], share: int, now: float) -> tuple[int, list[_Folder]]:
        """Do the same as `_record` for several subtrees with equal shares.

        Each subtree is the list of its unfinished directories.
        """
        left, finished = share, False
        while left and not finished:
            before, subtrees, finished = subtrees, [], True
            for position, folders in enumerate(before):
                part = left // (len(before) - position)
                if len(folders) == 1:
                    recorded, rest = self._record(folders[0], part, now)
                else:
                    recorded, rest = self._divide([[folder] for folder in folders], part, now)
                left -= recorded
                finished = finished and not recorded
                if rest:
                    subtrees.append(rest)
        return share - left, [folder for folders in subtrees for folder in folders]

    def watch(self, path: str, now: float) -> None:
        """Remember a cgroup if it exists, for `is_removed`."""
        if self._children(path) is not None:
            self._seen.put(path, True, now)

    def is_removed(self, path: str, now: float, when_empty: bool = False) -> bool:
        """Return whether a cgroup that `watch` saw is removed, or, with ``when_empty``, has no child cgroup left.

        False for a cgroup that `watch` never saw: it may be in another hierarchy.
        """
        if not self._seen.get(path, now):
            return False
        children = self._children(path)
        return children is None or (when_empty and children == 0)

    def _children(self, path: str) -> int | None:
        """Count the child cgroups; None if the cgroup does not exist. kernfs counts each child as a link."""
        if not self._root or "/.." in path or "\0" in path:
            return None
        try:
            return (self._root / path.lstrip("/")).stat().st_nlink - 2
        except OSError:
            return None


def _unrecorded(folder: _Folder) -> Iterator[tuple[int, _Folder]]:
    """Yield the id and the directory of each child that is not recorded yet. Raises OSError."""
    with os.scandir(f"{folder.root}{folder.path}") as entries:
        folders = (entry for entry in entries if entry.is_dir(follow_symlinks=False))
        for entry in islice(folders, folder.recorded, None):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as error:
                if error.errno in _REMOVED:
                    continue
                raise
            yield entry.inode(), _Folder(folder.root, f"{folder.path}/{entry.name}", _below(status))


def _below(status: os.stat_result) -> int:
    """Count the child cgroups. kernfs counts each as a link; file systems that do not count have one link."""
    return status.st_nlink - 2 if status.st_nlink > 1 else 1
