"""From a cgroup's id to its path in the v2 hierarchy, and whether a cgroup that was there has gone.

An id is the inode number of the cgroup's folder, and is never given again. open_by_handle_at(2) would tell the path
of one id, but needs CAP_DAC_READ_SEARCH; a walk needs nothing.

Rules
1. A walk notes MAX_CGROUPS, and takes a tenth of the time at most.
2. Each subtree has its share of them, however large the others are: of what is left after a folder's own children
   are noted, one child's subtree gets as much as any other's, and what it does not need goes to the larger ones.
3. What is left out is counted.
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

from udpwatch.agent.attribution.cache import Cache
from udpwatch.agent.attribution.container import MAX_PATH
from udpwatch.agent.kernel.cgroup import ROOT_ID

MAX_CGROUPS = 8192
MAX_DEPTH = 32
_UP = re.compile(r"^(/\.\.)+(?=/|$)")
_FOREVER = float("inf")
_GONE = errno.ENOENT, errno.ENODEV
_REST = 9  # after a walk, the next one waits so many times as long as it took


@dataclass(frozen=True, slots=True)
class _Folder:
    """A cgroup whose children are to be noted."""

    root: str
    path: str  # below the root
    below: int  # how many children it has
    noted: int = 0  # how many of them are noted


class Cgroups:
    """The tree below a mount of cgroup v2; without one every answer is a miss."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        # Those that have gone since the last walks, too. "": gone before it was seen.
        self._paths: Cache[int, str] = Cache(2 * MAX_CGROUPS, _FOREVER)
        self._seen: Cache[str, bool] = Cache(MAX_CGROUPS, _FOREVER)
        self._next_walk = -_FOREVER
        self.left_out = 0  # folders that walks did not look into or did not note, without what is below them

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
        """Note every cgroup; False where some were left out."""
        before = self.left_out
        try:
            status = root.stat()
        except OSError:
            return False
        if status.st_ino == ROOT_ID:  # else it is a part of the tree, and not for us to say which
            self._paths.put(ROOT_ID, "/", now)
        _, unfinished = self._note(_Folder(f"{root}", "", _below(status)), MAX_CGROUPS - 1, now)
        self.left_out += sum(folder.below - folder.noted for folder in unfinished)
        return self.left_out == before

    def _note(self, folder: _Folder, share: int, now: float) -> tuple[int, list[_Folder]]:
        """Note at most ``share`` of the cgroups below one: (how many it were, the folders with more of them)."""
        if not share:
            return 0, [folder]
        if folder.path.count("/") >= MAX_DEPTH or len(folder.path) >= MAX_PATH:
            self.left_out += folder.below
            return 0, []
        try:
            children = list(islice(_unnoted(folder), share))
        except OSError as error:
            self.left_out += error.errno not in _GONE
            return 0, []
        for number, child in children:
            self._paths.put(number, child.path, now)
        known = folder.noted + len(children)
        own = [replace(folder, noted=known)] if len(children) == share and folder.below > known else []
        noted, unfinished = self._divide([[child] for _, child in children if child.below], share - len(children), now)
        return len(children) + noted, own + unfinished

    def _divide(self, subtrees: list[list[_Folder]], share: int, now: float) -> tuple[int, list[_Folder]]:
        """As `_note`, for subtrees that have equal shares; a subtree is given by its unfinished folders."""
        left, finished = share, False
        while left and not finished:
            before, subtrees, finished = subtrees, [], True
            for position, folders in enumerate(before):
                part = left // (len(before) - position)
                if len(folders) == 1:
                    noted, rest = self._note(folders[0], part, now)
                else:
                    noted, rest = self._divide([[folder] for folder in folders], part, now)
                left -= noted
                finished = finished and not noted
                if rest:
                    subtrees.append(rest)
        return share - left, [folder for folders in subtrees for folder in folders]

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


def _unnoted(folder: _Folder) -> Iterator[tuple[int, _Folder]]:
    """Each cgroup in one that is not noted yet, with its number. Raises OSError."""
    with os.scandir(f"{folder.root}{folder.path}") as entries:
        folders = (entry for entry in entries if entry.is_dir(follow_symlinks=False))
        for entry in islice(folders, folder.noted, None):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise
            yield entry.inode(), _Folder(folder.root, f"{folder.path}/{entry.name}", _below(status))


def _below(status: os.stat_result) -> int:
    """How many cgroups are in this one: each is a link to it (kernfs). File systems that do not count have one link."""
    return status.st_nlink - 2 if status.st_nlink > 1 else 1
