"""Reads upstream servers from resolv.conf."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from udpwatch.dns.settings import Server

MAX_NAMESERVERS = 15
MAX_RESOLV_BYTES = 1 << 20

_NAMESERVER = re.compile(r"^\s*nameserver\s+(\S+)", re.MULTILINE)


def _read(path: Path) -> tuple[int, str]:
    """Return a file's mtime and contents. Never blocks, as a FIFO would. Raises OSError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISCHR(status.st_mode):  # /dev/null is one of these
            raise OSError(0, "not a regular file")
        return status.st_mtime_ns, file.read(MAX_RESOLV_BYTES).decode(errors="replace")


def read_resolv(files: tuple[Path, ...], complain: Callable[[str], None]) -> tuple[tuple[Server, ...] | None, bool]:
    """Return the servers of the newest file (dnsmasq's rule), or None if none could be read; and whether all could."""
    newest, text, complete = -1, "", True
    for path in files:
        try:
            changed, content = _read(path)
        except OSError as error:
            complain(f"cannot read {path}: {error.strerror}")
            complete = False
            continue
        if changed > newest:
            newest, text = changed, content
    if newest < 0 and not complete:
        return None, False
    servers = []
    for word in _NAMESERVER.findall(text)[:MAX_NAMESERVERS]:
        address = word.partition("%")[0]
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        except OSError:
            complain(f"ignoring nameserver {word!r}: not a numeric address")
            continue
        if Server(word) not in servers:
            servers.append(Server(word))
    return tuple(servers), complete
