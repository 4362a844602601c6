"""A UDP server whose memory lock (mmap_lock) is held for good, as any user can arrange it where FUSE is to be had.

The server maps a file of a FUSE file system that never answers a read. Another process reads the mapped page through
/proc/PID/mem and waits, with the lock held for reading. The server's mmap(2) waits for the lock to write, and whoever
asks for it next waits behind. Run as a program: withheld.py FOLDER PORT.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from udpwatch.agent.testing.lab import Namespace, die_with_parent

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_PAGE = 4096
_PROT_READ, _MAP_PRIVATE, _MAP_ANONYMOUS = 1, 2, 0x20
_CLONE_NEWNS, _MS_PRIVATE, _MNT_DETACH = 0x20000, 1 << 18 | 1 << 14, 2
# linux/fuse.h: fuse_in_header, fuse_out_header, fuse_attr, operations
_IN, _OUT, _ATTR = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ"), struct.Struct("=6Q10I")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _INIT = 1, 2, 3, 14, 15, 26


@contextlib.contextmanager
def withheld(namespace: Namespace, folder: Path, port: int) -> Iterator[int]:
    """The process id of such a server, with the lock held; on 0.0.0.0 of the namespace, it sends datagrams back."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse here: modprobe fuse")
    process = namespace.popen([sys.executable, __file__, str(folder), str(port)])
    try:
        assert process.stdout
        yield int(process.stdout.readline())
    finally:
        process.kill()  # its file system ends with it, and releases all that wait
        process.communicate()


def _child(function, *arguments) -> int:  # type: ignore[no-untyped-def]
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        function(*arguments)
        os._exit(0)
    return pid


def _serve(folder: str, port: int, told: int, go: int) -> None:
    """The server. A thread of it asks for the lock at a byte from ``go``."""
    file = os.open(f"{folder}/file", os.O_RDONLY)
    page = _libc.mmap(None, _PAGE, _PROT_READ, _MAP_PRIVATE, file, 0)
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", port))
    buffer = bytearray(100)

    def lock() -> None:
        os.read(go, 1)
        _libc.mmap(None, _PAGE, _PROT_READ, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)

    threading.Thread(target=lock, daemon=True).start()
    os.write(told, struct.pack("Q", page))
    while True:
        size, peer = server.recvfrom_into(buffer)
        server.sendto(memoryview(buffer)[:size], peer)


def _hold(pid: int, page: int) -> None:
    os.pread(os.open(f"/proc/{pid}/mem", os.O_RDONLY), 1, page)


def _answer(fuse: int, request: bytes) -> int:
    """Answer a request, unless it is a read; returns its operation."""
    _, operation, unique, node, *_ = _IN.unpack_from(request)
    mode = 0o040755 if node == 1 and operation != _LOOKUP else 0o100644
    attributes = _ATTR.pack(1 if mode & 0o040000 else 2, _PAGE, *[0] * 7, mode, 1, 0, 0, 0, _PAGE, 0)
    bodies = {
        _INIT: struct.pack("=4I2H2I2H8I", 7, 31, 0, 0, 16, 12, _PAGE, 1, 1, 0, *[0] * 8),
        _LOOKUP: struct.pack("=4Q2I", 2, 0, 3600, 3600, 0, 0) + attributes,
        _GETATTR: struct.pack("=QII", 3600, 0, 0) + attributes,
        _OPEN: bytes(16),
    }
    if operation in bodies:
        os.write(fuse, _OUT.pack(_OUT.size + len(bodies[operation]), 0, unique) + bodies[operation])
    elif operation not in (_READ, _FORGET):
        os.write(fuse, _OUT.pack(_OUT.size, -38, unique))  # ENOSYS
    return int(operation)


def _main(folder: str, port: int) -> None:
    assert _libc.unshare(_CLONE_NEWNS) == 0
    assert _libc.mount(b"none", b"/", None, _MS_PRIVATE, None) == 0
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
    assert _libc.mount(b"withheld", folder.encode(), b"fuse", 0, options.encode()) == 0
    (pages, told), (gone, go) = os.pipe(), os.pipe()
    read = threading.Event()

    def answer() -> None:
        while True:
            if _answer(fuse, os.read(fuse, 1 << 17)) == _READ:
                read.set()

    def without_fuse(function, *arguments) -> None:  # type: ignore[no-untyped-def]
        os.close(fuse)  # its last descriptor goes with this process
        function(*arguments)

    server = _child(without_fuse, _serve, folder, port, told, gone)
    threading.Thread(target=answer, daemon=True).start()
    (page,) = struct.unpack("Q", os.read(pages, 8))
    _child(without_fuse, _hold, server, page)
    assert read.wait(30)
    os.write(go, b"x")
    end = time.monotonic() + 30
    while not any(_state(each) == "D" for each in Path(f"/proc/{server}/task").iterdir()):
        assert time.monotonic() < end
        time.sleep(0.01)
    print(server, flush=True)
    signal.pause()


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
