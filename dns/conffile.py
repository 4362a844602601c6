r"""dnsmasq's configuration files: lines of ``name=value`` or ``name``, as its option.c reads them.

Rules
1. A character between quotes has no special meaning any more. It is *hidden* until the value has been taken apart, so
   that a comma or a space between quotes does not separate; `plain` brings it back.
2. What is hidden lies where no text can come from: UTF-8 never decodes to a lone surrogate, and bytes of the command
   line that are no UTF-8 become U+DC80 and up.
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
    """One setting of a file."""

    where: str  # FILE line N
    name: str
    value: str | None  # may hold hidden characters; None: no "="


def plain(text: str) -> str:
    """The text with what was hidden in its place again."""
    return text.translate(_SHOW)


def parts(text: str, separator: str = ",") -> list[str]:
    """What stands between separators that are not hidden, without the spaces around it, in plain characters."""
    return [plain(part.strip(" ")) for part in text.split(separator)]


def shown(path: Path) -> str:
    """A path for a message of one line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def lines(path: Path) -> Iterator[Line]:
    """A file's settings. Raises FileError where it cannot be read, ConfigError for a line that cannot."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"conf-file: cannot read {shown(path)}: {error.strerror}") from None
    for number, raw in enumerate(data.split(b"\n"), 1):
        where = f"{shown(path)} line {number}"
        try:
            text = _unquote(raw.decode()).strip(" ")
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: not UTF-8") from None
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        if text:
            name, equals, value = text.partition("=")
            yield Line(where, plain(name.rstrip(" ")), value.lstrip(" ") if equals else None)


def folder_files(value: str) -> list[Path]:
    """The files that ``conf-dir=FOLDER[,SUFFIX..]`` means, sorted: without those that end in a SUFFIX; with *SUFFIX
    only those that do. Backups and hidden files never count. Raises FileError where one cannot be looked at.
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
    """A line without its comment and its quotes, what was quoted hidden. Raises ValueError with what is wrong."""
    if "\0" in line:
        raise ValueError("a NUL character")
    if '"' not in line and "#" not in line:  # nearly every line of a list of a million
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
    """Hide what follows an opening quote; the offset behind the closing one. Raises ValueError."""
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
