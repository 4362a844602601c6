r"""Reads dnsmasq's configuration files: lines of ``name=value`` or ``name``, parsed as its option.c does.

Rules
1. A quoted character has no special meaning. It is *hidden* until the value has been split, so that a comma or a space
   in quotes does not separate; `plain` restores it.
2. Hidden characters are lone surrogates below U+DC80, which no input contains: UTF-8 never decodes to a lone surrogate,
   and bytes of the command line that are not UTF-8 become U+DC80 and above.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from udpwatch.dns.errors import ConfigError, FileError

_SPACE = " \t\v\f\r"
_ESCAPES = {'"': '"', "t": "\t", "n": "\n", "e": "\033", "b": "\b", "r": "\r", "\\": "\\"}
_HIDE = {code: 0xDC00 + code for code in range(0x80)}
_SHOW = {hidden: code for code, hidden in _HIDE.items()}
_BLANK = str.maketrans(_SPACE, " " * len(_SPACE))


@dataclass(frozen=True, slots=True)
class Line:
    """One setting in a file."""

    where: str  # FILE line N
    name: str
    value: str | None  # may hold hidden characters; None: no "="


def plain(text: str) -> str:
    """Restore hidden characters."""
    return text.translate(_SHOW)


def parts(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are not hidden. The parts have no surrounding spaces and are plain."""
    return [plain(part.strip(" ")) for part in text.split(separator)]


def shown(path: Path) -> str:
    """Return a path for a message of one line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def lines(path: Path) -> Iterator[Line]:
    """Yield a file's settings. Raises FileError if it cannot be read, ConfigError for an invalid line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"conf-file: cannot read {shown(path)}: {error.strerror}") from None
    for number, raw in enumerate(data.split(b"\n"), 1):
        if line := parse_line(f"{shown(path)} line {number}", raw):
            yield line


def parse_line(where: str, raw: bytes) -> Line | None:
    """Return the setting of a line, or None if it has none. Raises ConfigError."""
    try:
        text = _unquote(raw.decode().rstrip("\n")).strip(" ")
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not text:
        return None
    name, equals, value = text.partition("=")
    return Line(where, plain(name.rstrip(" ")), value.lstrip(" ") if equals else None)


def folder_files(value: str) -> list[Path]:
    """Return the files of ``conf-dir=FOLDER[,SUFFIX..]``, sorted.

    Files that end in SUFFIX are left out; with *SUFFIX, all others are. Backups and hidden files never count. Raises
    FileError if the folder or a file cannot be inspected.
    """
    name, *suffixes = parts(value)
    folder = Path(name)
    wanted = tuple(suffix[1:] for suffix in suffixes if suffix.startswith("*") and suffix != "*")
    ignored = tuple(suffix for suffix in suffixes if suffix and not suffix.startswith("*"))
    files = []
    try:
        for path in sorted(folder.iterdir()):
            if _counts(path.name, wanted, ignored) and stat.S_ISREG(path.stat().st_mode):
                files.append(path)
    except OSError as error:
        raise FileError(f"conf-dir: cannot read {shown(Path(error.filename or folder))}: {error.strerror}") from None
    return files


def _counts(name: str, wanted: tuple[str, ...], ignored: tuple[str, ...]) -> bool:
    backup = name.startswith(".") or name.endswith("~") or (name.startswith("#") and name.endswith("#"))

    def ends(suffixes: tuple[str, ...]) -> bool:
        return any(name.endswith(suffix) and name != suffix for suffix in suffixes)

    return not backup and (not wanted or ends(wanted)) and not ends(ignored)


def _unquote(line: str) -> str:
    """Remove the comment and the quotes, and hide what was quoted. Raises ValueError with the problem."""
    if "\0" in line:
        raise ValueError("a NUL character")
    if '"' not in line and "#" not in line:  # nearly every line of a long list
        return line.translate(_BLANK)
    out: list[str] = []
    white, at = True, 0
    while at < len(line):
        character = line[at]
        at += 1
        if character == '"':
            at = _quoted(line, at, out)
            white = False
        elif white and character == "#":
            break
        else:
            white = character in _SPACE
            out.append(" " if white else character)
    return "".join(out)


def _quoted(line: str, at: int, out: list[str]) -> int:
    """Hide what follows an opening quote. Return the offset after the closing one. Raises ValueError."""
    while at < len(line):
        character = line[at]
        at += 1
        if character == '"':
            return at
        if character == "\\" and line[at : at + 1] in _ESCAPES:
            character = _ESCAPES[line[at]]
            at += 1
        out.append(character.translate(_HIDE))
    raise ValueError('a missing "')
