"""Socket calls of the C library that Python lacks, or for which it gives the GIL up.

None of them blocks. So they keep the GIL (PyDLL): getting it back from a busy event loop takes milliseconds, twice per
response.
"""

from __future__ import annotations

import ctypes
import os
import socket

DONTWAIT = int(socket.MSG_DONTWAIT)
MAX_DATAGRAM_BYTES = 65_535

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_libc.sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
_libc.recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.recv.restype = ctypes.c_ssize_t

#: (descriptor, headers, count, DONTWAIT, None): receive datagrams into an array of struct mmsghdr, whose address is
#: ``headers``. Returns how many; -1 for none or an error.
recvmmsg = _libc.recvmmsg
#: (descriptor, headers, count, DONTWAIT): send datagrams. Returns how many; -1 if the first one failed.
sendmmsg = _libc.sendmmsg
#: (descriptor, octets, their number, DONTWAIT): send a datagram over a connected socket. Returns -1 for an error.
send = _libc.send
send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
send.restype = ctypes.c_ssize_t

_buffer = ctypes.create_string_buffer(MAX_DATAGRAM_BYTES)  # for `recv`: one thread
_buffer_at, _received = ctypes.addressof(_buffer), memoryview(_buffer)


def last_error() -> OSError:
    """Return the error of the last call that failed in this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))  # of the class of its number, such as BlockingIOError


def recv(descriptor: int, most: int) -> bytes:
    """Return the next datagram, cut at ``most`` octets. Raises BlockingIOError when there is none, else OSError.

    One thread at a time may call this: the memory is shared.
    """
    size = _libc.recv(descriptor, _buffer_at, most, DONTWAIT)
    if size < 0:
        raise last_error()
    return bytes(_received[:size])
