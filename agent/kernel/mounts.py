"""Open kernel file systems that are not mounted, without a visible mount.

fsopen(2) and fsmount(2) (in v5.2) create a mount that only its descriptor refers to. No other process sees it, and it
is gone with the descriptor, even after SIGKILL.
"""

from __future__ import annotations

import ctypes
import os

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture
_CONFIG_CREATE = 6

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def open_private(filesystem: str) -> int:
    """Return a descriptor of the root of a private mount ("cgroup2", "securityfs").

    Raises OSError: EPERM without CAP_SYS_ADMIN, ENODEV if the kernel lacks the file system.
    """
    context = _call("fsopen", _FSOPEN, filesystem.encode(), 1)
    try:
        _call("fsconfig", _FSCONFIG, context, _CONFIG_CREATE, None, None, 0)
        mount = _call("fsmount", _FSMOUNT, context, 1, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
