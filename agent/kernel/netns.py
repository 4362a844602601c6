"""Enter network namespaces, and find the one with a given cookie."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000
MAX_ENTRIES = 1_024  # of the threads and of the descriptors of a process: it may have a million
_SO_NETNS_COOKIE = 71  # Linux kernel commit e8b9eab99232 ("net: retrieve netns cookie via getsocketopt") (in v5.14)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(name: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def setns(fd: int) -> None:
    """Move the calling thread into a network namespace; raises OSError."""
    _check("setns", _libc.setns(fd, CLONE_NEWNET))


@contextmanager
def entered(fd: int) -> Iterator[None]:
    """Run the body in another network namespace. Only the calling thread moves, and it comes back.

    The current namespace is not entered again: that would need CAP_SYS_ADMIN.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_ino == os.fstat(home).st_ino:
            yield
            return
        setns(fd)
        try:
            yield
        finally:
            setns(home)
    finally:
        os.close(home)


def create() -> int:
    """Return a descriptor of a new network namespace without a name; it lives as long as something refers to it.

    The calling thread does not move. Raises OSError.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check("unshare", _libc.unshare(CLONE_NEWNET))
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            setns(home)
    finally:
        os.close(home)


def cookie_here() -> int:
    """Return the cookie of the namespace of the calling thread; raises OSError on kernels before 5.14."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        cookie: int = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
        return cookie


@contextmanager
def entered_by_cookie(cookie: int, pid: int, everywhere: bool = True) -> Iterator[bool]:
    """Run the body in the namespace with this cookie; yield False without moving if it is not found.

    The namespaces of ``pid`` are tried first, because the sender is nearly always in one of them, and then all of /proc
    if ``everywhere``. Namespaces other than our own need CAP_SYS_ADMIN, and CAP_SYS_PTRACE for processes of other
    users; namespaces that cannot be opened are skipped.
    """
    if cookie_here() == cookie:
        yield True
        return
    fd = _open_by_cookie(cookie, pid, everywhere)
    if fd is None:
        yield False
        return
    try:
        with entered(fd):
            yield True
    finally:
        os.close(fd)


def of_process(pid: int) -> Iterator[int]:
    """Yield each namespace that a process uses, as a descriptor that is open until the next one."""
    return _distinct(_of_process(pid))


def everywhere(thorough: bool = False) -> Iterator[int]:
    """Yield each namespace that can be found, our own first, as a descriptor that is open until the next one. With
    ``thorough``, also those that only a thread, or a descriptor of a process, is in.

    Raises OSError (EMFILE, ENFILE) if there are no free descriptors.
    """
    paths = itertools.chain(_links("/proc/thread-self/ns/net"), _of_all_processes())
    if thorough:
        paths = itertools.chain(paths, itertools.chain.from_iterable(map(_of_process, _processes())))
    yield from _distinct(paths)


def _open_by_cookie(cookie: int, pid: int, everywhere: bool) -> int | None:
    for fd in _distinct(itertools.chain(_of_process(pid), _of_all_processes() if everywhere else ())):
        with contextlib.suppress(OSError), entered(fd):
            if cookie_here() == cookie:
                return os.dup(fd)
    return None


def _distinct(links: Iterable[tuple[str, int]]) -> Iterator[int]:
    """Yield each namespace once, as a descriptor that is open until the next one. ``links``: path, inode number."""
    seen: set[int] = set()
    for path, number in links:
        if number in seen:
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            continue  # it has ended, or cannot be opened
        try:
            inode = os.fstat(fd).st_ino
            if inode not in seen:
                seen.add(inode)
                yield fd
        finally:
            os.close(fd)


def _links(*paths: str) -> Iterator[tuple[str, int]]:
    """Yield the links of /proc that lead to a network namespace, each with the inode number of the namespace.

    Reading a link costs a tenth of opening it, and there may be a hundred thousand of them.
    """
    for path in paths:
        with contextlib.suppress(OSError):  # it has ended, was closed, or may not be read
            target = os.readlink(path)  # noqa: PTH115 pathlib takes three times as long
            if target.startswith("net:["):
                yield path, int(target[5:-1])


def _of_process(pid: int) -> Iterator[tuple[str, int]]:
    process = f"/proc/{pid}"
    yield from _links(f"{process}/ns/net")
    # VPN and CNI daemons serve several namespaces: a thread has entered another one, or a descriptor refers to it.
    threads = _entries(f"{process}/task", MAX_ENTRIES)
    if len(threads) > 1:
        yield from _links(*(f"{thread}/ns/net" for thread in threads))
    yield from _links(*_entries(f"{process}/fd", MAX_ENTRIES))


def _of_all_processes() -> Iterator[tuple[str, int]]:
    for folder in ("/run/netns", "/run/docker/netns"):
        yield from ((path, 0) for path in _entries(folder))
    yield from _links(*(f"/proc/{process}/ns/net" for process in _processes()))


def _processes() -> Iterator[int]:
    return (int(path.rpartition("/")[2]) for path in _entries("/proc") if path[6:].isdigit())


def _entries(folder: str, most: int | None = None) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [f"{folder}/{entry.name}" for entry in itertools.islice(entries, most)]
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return []
