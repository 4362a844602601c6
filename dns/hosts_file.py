"""Finds and reads hosts files."""

from __future__ import annotations

import io
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from udpwatch.dns.idn import to_ascii
from udpwatch.dns.names import MAX_NAME_BYTES, lower, name_from_text, pack_address
from udpwatch.dns.settings import ETC_HOSTS, Settings

MAX_FILE_BYTES = 1 << 30
MAX_COMPLAINTS = 20  # per file; the rest are counted in one line
DEV_NULL = os.makedev(1, 3)  # allowed: an empty file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # written by editors on other systems
CHANGING_TRIES, CHANGING_SECONDS = 20, 0.05  # for a file that is being written

#: Takes a log line.
Complain = Callable[[str], None]
#: Takes an address (4 or 16 octets) and its names. Returns the problem with them, or "".
Add = Callable[[bytes, list[bytes]], str]

_PLAIN_NAME = re.compile(rb"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")


def hosts_files(settings: Settings, complain: Complain) -> Iterator[Path]:
    """Yield hosts files in the order in which they are read. In a folder, backups and hidden files do not count
    (dnsmasq's rule: ``#file#``, ``.file``, ``file~``)."""
    if settings.hosts:
        yield ETC_HOSTS
    for path in settings.addn_hosts:
        try:
            inside = sorted(path.iterdir()) if path.is_dir() else None
        except OSError as error:
            complain(f"cannot read {path}: {error.strerror}")
            continue
        if inside is None:
            yield path
            continue
        for each in inside:
            if not _is_left_out(each.name) and not each.is_dir():
                yield each


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name.endswith("~") or (name.startswith("#") and name.endswith("#"))


def read_steady(path: Path) -> bytes:
    """Return a file's contents; read it again if it was written meanwhile. Raises OSError."""
    for _ in range(CHANGING_TRIES):
        # Non-blocking: opening a FIFO must not hang.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode) and before.st_rdev != DEV_NULL:
                raise OSError(0, "not a regular file")
            if before.st_size > MAX_FILE_BYTES:
                raise OSError(0, f"larger than {MAX_FILE_BYTES >> 20} MB")
            data = file.read(before.st_size)
            after = os.fstat(file.fileno())
        unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        if unchanged and time.time() - after.st_mtime > CHANGING_SECONDS:  # else it may just have been truncated
            break
        time.sleep(CHANGING_SECONDS)
    return data


def read_hosts(path: Path, domain: bytes, add: Add, complain: Complain) -> None:
    """Pass every address with its names to ``add``. Raises OSError where the file cannot be read."""
    bad = 0
    for number, line in enumerate(io.BytesIO(read_steady(path).removeprefix(BYTE_ORDER_MARK)), 1):
        words = line.partition(b"#")[0].split()
        if not words:
            continue
        problem = _read_line(add, words, domain)
        if problem:
            bad += 1
            if bad <= MAX_COMPLAINTS:
                complain(f"bad {problem} at {path} line {number}")
    if bad > MAX_COMPLAINTS:
        complain(f"{bad - MAX_COMPLAINTS} more bad lines in {path}")


def _read_line(add: Add, words: list[bytes], domain: bytes) -> str:
    """Add the valid names of a line. Return the problem with it, or ""."""
    try:
        packed = pack_address(words[0].decode())
    except (OSError, ValueError):
        return "address"
    names, problem = [], "" if len(words) > 1 else "line without a name"
    for word in words[1:]:
        name = _host_name(word)
        if name is None:
            problem = "name"
            continue
        if domain and name[1 + name[0]] == 0:  # one label
            if len(name) - 1 + len(domain) <= MAX_NAME_BYTES:
                names.append(name[:-1] + domain)
            else:
                problem = "name"
        names.append(name)
    if names and (refused := add(packed, names)):
        return refused
    return problem


def _host_name(word: bytes) -> bytes | None:
    """Convert to wire format in lower case, international names in their xn-- form; None for an invalid host name."""
    word = word.lower()
    if _PLAIN_NAME.fullmatch(word) and len(word) < 254:
        return b"".join([bytes((len(label),)) + label for label in word.split(b".")]) + b"\0"
    try:
        text = word.decode()
        if "\\" in text or not text.isprintable():
            return None
        name = lower(name_from_text(to_ascii(text)))
    except ValueError:  # UnicodeDecodeError is one
        return None
    return name if name != b"\0" else None
