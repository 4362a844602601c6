"""Opening kernel file systems that nobody mounted, without mounting them anywhere.

fsopen(2) and fsmount(2) (in v5.2) give a mount that only its descriptor names: no other process sees it, and it
is gone with the descriptor, also after SIGKILL.
"""

from __future__ import annotations

import ctypes
import os

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture since they were added
_CONFIG_CREATE = 6

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def open_private(filesystem: str) -> int:
    """A descriptor of the root folder of a privately mounted file system ("cgroup2", "securityfs").

    Raises OSError: EPERM without CAP_SYS_ADMIN, ENODEV when the kernel has no such file system.
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
