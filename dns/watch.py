"""Watches files for changes of any kind: written, replaced, or a symbolic link that points elsewhere (as Kubernetes
updates a ConfigMap). inotify wakes the watch; a change counts when the files' state differs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from inotify_simple import INotify, flags

SETTLE_SECONDS = 0.1  # for a burst of changes to end
#: For what inotify does not report: folders that do not exist yet, network file systems.
LOOK_SECONDS = 5.0
MAX_PAUSE_SECONDS = 300.0  # between attempts to read unreadable files; the first pause is LOOK_SECONDS

_WHAT = flags.CLOSE_WRITE | flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO | flags.ATTRIB

#: path, device, inode, size, mtime, ctime; ctime changes with permissions, so a file that becomes readable differs
State = tuple[tuple[str, int, int, int, int, int], ...]
_MISSING = (0, 0, 0, 0, 0)

log = logging.getLogger(__name__)


class Watch:
    """Watches the files that ``files`` returns; calls ``changed`` in the event loop, one call at a time.

    ``changed`` returns whether it could read all files. If not, it is called again after a while: the cause need not be
    in the files (there may have been no free descriptor).
    """

    def __init__(self, files: Callable[[], list[Path]], changed: Callable[[], Awaitable[bool]]) -> None:
        self._files, self._changed = files, changed
        self._seen: State | None = self._state()  # the state that was read
        self._failed: State | None = None  # the state that could not be read
        self._again, self._pause = 0.0, LOOK_SECONDS  # next attempt (monotonic seconds), next pause
        self._notify: INotify | None = None
        with contextlib.suppress(OSError):  # the limit on inotify instances is reached: polling has to do
            self._notify = INotify(nonblocking=True)

    def start(self, read: bool = True) -> None:
        """Start. ``read``: whether all files could be read in the state they had when the watch was created."""
        if not read:
            self._note_failure(self._seen)
            self._seen = None
        self._word = asyncio.Event()
        if self._notify:
            asyncio.get_running_loop().add_reader(self._notify.fileno(), self._heard)
            self._mark()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop."""
        if hasattr(self, "_task"):
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._notify:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._notify.fileno())
            self._notify.close()

    def _heard(self) -> None:
        assert self._notify
        with contextlib.suppress(BlockingIOError):
            while os.read(self._notify.fileno(), 65_536):
                pass
        self._word.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                # Not wait_for(): before Python 3.12 it loses a cancellation that comes with the word.
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._word.wait()
                await asyncio.sleep(SETTLE_SECONDS)
            self._word.clear()
            try:
                self._mark()
                state = self._state()
                if state != self._seen and (state != self._failed or time.monotonic() >= self._again):
                    self._note_failure(state)  # until `changed` succeeds
                    if await self._changed():
                        self._seen, self._failed, self._pause = state, None, LOOK_SECONDS
            except Exception:  # a bug must not end the watch
                log.exception("dns: cannot follow a change of files: internal error")

    def _note_failure(self, state: State | None) -> None:
        self._failed, self._again = state, time.monotonic() + self._pause
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)

    def _mark(self) -> None:
        """Watch the folders of all files and of their link targets. Watching a folder again has no effect."""
        if not self._notify:
            return
        for folder in {each for path in self._files() for each in _folders(path)}:
            with contextlib.suppress(OSError):
                if folder.is_dir():
                    self._notify.add_watch(folder, _WHAT)

    def _state(self) -> State:
        found = []
        for path in self._files():
            try:
                if path.is_dir():
                    found += [_stat(each) for each in sorted(path.iterdir())]
                else:
                    found.append(_stat(path))
            except OSError:
                found.append((str(path), *_MISSING))
        return tuple(found)


def _folders(path: Path) -> set[Path]:
    """Return the folders in which a change can make this path lead to another file.

    These are its own, those of the symbolic links on the way, and that of the target.
    """
    found = {path, path.parent}
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a loop of links
        found |= {each.parent for each in (path, *path.parents) if each.is_symlink()}
        found.add(path.resolve().parent)
    return found


def _stat(path: Path) -> tuple[str, int, int, int, int, int]:
    try:
        at = path.stat()
    except OSError:
        return str(path), *_MISSING
    return str(path), at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns
