"""Reads the command line of `udpwatch dns` and configuration files, as dnsmasq does.

Rules
1. Every option is one row of option_table.py.
2. Nothing that has an effect in dnsmasq is ignored. Options that only dnsmasq has are refused by name, and so are
   unknown ones. Those that do nothing in dnsmasq without a refused one (IDLE) are accepted.
3. An option never means anything else than it means to dnsmasq; if udpwatch does not do that, the option is refused.
4. The order of options does not matter, except where it does for dnsmasq: files override the command line, and the
   order of servers and names is kept. What depends on several options is computed at the end, in `_finish`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from udpwatch.dns import message, names, values
from udpwatch.dns.conffile import lines, plain, shown
from udpwatch.dns.errors import ConfigError, FileError
from udpwatch.dns.option import Option
from udpwatch.dns.option_readers import Draft, Information, add_mx
from udpwatch.dns.option_table import BY_NAME, BY_SHORT, DOCUMENT
from udpwatch.dns.other_options import REASONS, REFUSED, REFUSED_SHORT
from udpwatch.dns.settings import ANY_PORTS, Ports, Settings, StaticRecord
from udpwatch.dns.values import Rejected

MAX_DEPTH = 16  # conf-file within conf-file
LOWEST_PORT, HIGHEST_PORT = (
    1024,
    65_535,
)  # of a range of source ports of which only the other end is given, as in dnsmasq


def parse(arguments: Sequence[str]) -> Settings | Information:
    """Read the arguments of `udpwatch dns`. Raises ConfigError for an invalid argument or line of a file, and FileError
    for a configuration file that cannot be read.
    """
    draft = Draft()
    for word in arguments:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"{word!r}: not UTF-8")
    for where, option, value in _words(arguments):
        _apply(draft, where, option, value, in_file=False)
        if draft.information:
            return draft.information
    _read_files(draft, depth=1)
    settings = _finish(draft)
    return Information("syntax check OK.", settings) if draft.test else settings


def read_conf(path: Path) -> Settings:
    """Read one configuration file and what it includes. Raises ConfigError and FileError."""
    draft = Draft(files=[path])
    _read_files(draft, depth=1)
    return _finish(draft)


def _words(arguments: Sequence[str]) -> Iterator[tuple[str, Option, str | None]]:
    """Yield each option as written, its row and its value, split as getopt_long does. Raises ConfigError."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            for rest in words:
                raise ConfigError(f"{rest!r}: unexpected argument; see --help")
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = _long(name)
            where = f"--{option.name}"
            if not equals and option.needs_value:
                yield where, option, _next(where, words)
            else:
                yield where, option, value if equals else None
        elif word.startswith("-") and word != "-":
            at = 1
            while at < len(word):
                option, where = _letter(word[at]), f"-{word[at]}"
                at += 1
                if option.short_needs_value:
                    yield where, option, word[at:] or _next(where, words)
                    break
                yield where, option, None  # getopt never gives -q a value
        elif word.strip():  # dnsmasq ignores empty arguments, which scripts leave behind
            raise ConfigError(f"{word!r}: unexpected argument; see --help")


def _next(where: str, words: Iterator[str]) -> str:
    """Return the value in the next argument. One that looks like an option is refused: the values of --resolv-file,
    --cache-size and --conf-file are optional in dnsmasq, which would read it as an option."""
    value = next(words, "-")
    if value.startswith("-"):
        raise ConfigError(f"{where}: missing value" + (f" before {value!r}" if len(value) > 1 else ""))
    return value


def _long(name: str) -> Option:
    """Return the option with this name or unambiguous abbreviation. Raises ConfigError."""
    if name not in BY_NAME and name not in REFUSED:
        meant = [known for known in (*BY_NAME, *REFUSED) if known.startswith(name)]
        if len(meant) > 1:
            more = ", .." if len(meant) > 5 else ""
            raise ConfigError(
                f"--{name}: ambiguous option; it could be {', '.join(f'--{known}' for known in meant[:5])}{more}"
            )
        name = meant[0] if meant else name
    return _known(name, f"--{name}", "--help")


def _letter(letter: str) -> Option:
    if letter in BY_SHORT:
        return BY_SHORT[letter]
    name = REFUSED_SHORT.get(letter, "")
    return _known(name, f"--{name} (-{letter})" if name else f"-{letter}", "--help")


def _known(name: str, where: str, see: str) -> Option:
    if name in REFUSED:
        raise ConfigError(f"{where}: {REASONS[name]}; see {DOCUMENT}")
    if name not in BY_NAME:
        raise ConfigError(f"{where if where.isprintable() else repr(where)}: unknown option; see {see}")
    return BY_NAME[name]


def _read_files(draft: Draft, depth: int) -> None:
    """Read the files named so far; files that they name are read in their place.

    As in dnsmasq, each file is read once, so that a loop ends.
    """
    files, draft.files = draft.files, []
    for path in files:
        if depth > MAX_DEPTH:
            raise ConfigError(f"conf-file: {shown(path)} is nested more than {MAX_DEPTH} files deep")
        try:
            status = path.stat()
        except OSError as error:
            raise FileError(f"conf-file: cannot read {shown(path)}: {error.strerror}") from None
        if (status.st_dev, status.st_ino) in draft.seen:
            continue
        draft.seen.add((status.st_dev, status.st_ino))
        for line in lines(path):
            where = f"{line.where}: {line.name}"
            option = _known(line.name, where, DOCUMENT)
            if option.command_line_only:
                raise ConfigError(f"{where}: allowed on the command line only")
            _apply(draft, where, option, line.value, in_file=True)
            if draft.files:
                _read_files(draft, depth + 1)


def _apply(draft: Draft, where: str, option: Option, value: str | None, in_file: bool) -> None:
    """Add one option to the draft. Raises ConfigError; FileError for a folder."""
    if value is not None and not option.value:
        raise ConfigError(f"{where}: unexpected value {_shown(value)}; this option takes none")
    if value is None and option.needs_value:
        raise ConfigError(f"{where}: missing value; expected {option.value}")
    if option.once:
        if draft.once.get(option.name) is in_file:
            raise ConfigError(f"{where}: given more than once")
        draft.once[option.name] = in_file
    try:
        option.read(draft, value or "")
    except Rejected as error:
        raise ConfigError(f"{where}: invalid value {_shown(value or '')}; expected {error}") from None


def _shown(value: str) -> str:
    text = plain(value)
    return repr(text if len(text) <= 200 else text[:200] + "..")


# ---- combinations of options ----


def _finish(draft: Draft) -> Settings:
    """Create the settings. Raises ConfigError for options that contradict each other."""
    mail = _finish_mail(draft)
    many = {name: tuple(items) for name, items in draft.many.items()}
    given: dict[str, Any] = draft.fields | many | mail
    given |= {"domain_servers": draft.domain_servers(), "ports": _ports(draft)}
    settings = Settings(**given)
    if settings.resolv and not settings.poll and len(settings.resolv_files) > 1:
        raise ConfigError(
            "--no-poll: allowed with one --resolv-file only; finding the newest of several requires polling"
        )
    if settings.ports.single and settings.ports.low == settings.port:
        raise ConfigError(f"--query-port={settings.port}: is also --port; choose another one for either")
    _check_cnames(draft.cnames)
    changes: dict[str, Any] = {"records": tuple(_qualified(record, settings.domain) for record in settings.records)}
    if settings.interfaces or settings.except_interfaces or settings.listen_addresses:
        changes["local_service"] = False
    elif draft.local_service == "host":
        changes |= {"local_service": False, "interfaces": ("lo",), "bind_interfaces": True}
    return replace(settings, **_finish_listening(settings), **changes)


def _ports(draft: Draft) -> Ports:
    """Combine the options of source ports as dnsmasq does: a fixed port wins, and a range is open at either end."""
    if draft.query_port is not None:
        return Ports(draft.query_port, draft.query_port, single=True)
    if not draft.min_port and not draft.max_port:
        return ANY_PORTS
    low, high = draft.min_port or LOWEST_PORT, draft.max_port or HIGHEST_PORT
    if low > high:
        raise ConfigError(
            f"--max-port={high}: less than --min-port={low}" + ("" if draft.min_port else ", the default")
        )
    return Ports(low, high)


def _finish_listening(settings: Settings) -> dict[str, Any]:
    """Check 0.0.0.0 and ::, which listen on every address in dnsmasq with --bind-interfaces only. Else no query
    matches them: dnsmasq compares them with the address that was asked."""
    every = [text for text in settings.listen_addresses if ipaddress.ip_address(text).is_unspecified]
    others = tuple(text for text in settings.listen_addresses if text not in every)
    for text in every:
        version = ipaddress.ip_address(text).version
        where = f"--listen-address={text}"
        if not settings.bind_interfaces and (settings.bind_dynamic or not (others or settings.interfaces)):
            other = " instead of --bind-dynamic" if settings.bind_dynamic else ""
            raise ConfigError(
                f"{where}: no query matches it without --bind-interfaces, as in dnsmasq; add --bind-interfaces{other} "
                f"to listen on every IPv{version} address"
            )
        same = [each for each in others if ipaddress.ip_address(each).version == version]
        if settings.bind_interfaces and (same or settings.interfaces):
            other = f"--listen-address={same[0]}" if same else f"--interface={settings.interfaces[0]}"
            raise ConfigError(
                f"{where}: includes every IPv{version} address, which dnsmasq cannot bind twice; remove it or {other}"
            )
    if settings.bind_interfaces or not every:
        return {}
    text = " and ".join(every)
    return {
        "listen_addresses": others,
        "notices": (f"--listen-address={text} has no effect without --bind-interfaces, as in dnsmasq",),
    }


def _finish_mail(draft: Draft) -> dict[str, Any]:
    """Add the MX records that `--mx-target` and this host's name complete. Return the settings of `--localmx`."""
    complete = draft.mail_hosts or draft.mail_for_local
    if not complete and (not draft.mail_target or draft.has_mail_or_service):
        return {}
    host = _host_name()
    target = draft.mail_target or host
    for name in draft.mail_hosts:
        add_mx(draft, name, target)
    if not draft.has_mail_or_service:  # dnsmasq's rule
        add_mx(draft, host, target, 0)
    return {"local_mx": target} if draft.mail_for_local else {}


def _host_name() -> bytes:
    text = socket.gethostname()
    try:
        return values.name_of(text)
    except Rejected as error:
        raise ConfigError(f"cannot use this host's name {text!r} for MX records: expected {error}") from None


def _qualified(record: StaticRecord, domain: bytes) -> StaticRecord:
    """Add --domain to an SRV record of _SERVICE._PROTO alone."""
    if record.type != message.Type.SRV or not domain or names.label_count(record.name) != 2:
        return record
    name = record.name[:-1] + domain
    if len(name) > names.MAX_NAME_BYTES:
        raise ConfigError(f"--srv-host: {names.name_to_text(record.name)} is too long for --domain")
    return replace(record, name=name)


def _check_cnames(cnames: dict[bytes, bytes]) -> None:
    """Raise ConfigError if aliases form a loop."""
    fine: set[bytes] = set()
    for alias in cnames:
        path: dict[bytes, None] = {}
        name = alias
        while name in cnames and name not in fine:
            if name in path:
                raise ConfigError(f"--cname: {names.name_to_text(name)} forms a loop")
            path[name] = None
            name = cnames[name]
        fine.update(path)
