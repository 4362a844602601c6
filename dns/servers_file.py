"""Reads upstream servers from `--servers-file`.

A line is ``server=VALUE`` or ``rev-server=VALUE`` of a configuration file, after the servers of the options. As in
dnsmasq, an invalid line is reported and skipped: the file changes while the responder runs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from udpwatch.dns.conffile import parse_line, plain
from udpwatch.dns.errors import ConfigError
from udpwatch.dns.hosts_file import MAX_COMPLAINTS, read_steady
from udpwatch.dns.option_readers import Draft, read_rev_server, read_server
from udpwatch.dns.settings import DomainServers, Server, Settings
from udpwatch.dns.values import Rejected

_READERS = {"server": read_server, "rev-server": read_rev_server}


def read_servers(
    path: Path, settings: Settings, complain: Callable[[str], None]
) -> tuple[tuple[Server, ...], tuple[DomainServers, ...]]:
    """Return the default servers and those of domains, of the options and of the file. Raises OSError."""
    draft = Draft.of_servers(settings.servers, settings.domain_servers)
    bad = 0
    for number, raw in enumerate(io.BytesIO(read_steady(path)), 1):
        try:
            _read_line(draft, f"{path} line {number}", raw)
        except ConfigError as error:
            bad += 1
            if bad <= MAX_COMPLAINTS:
                complain(str(error))
    if bad > MAX_COMPLAINTS:
        complain(f"{bad - MAX_COMPLAINTS} more bad lines in {path}")
    return tuple(draft.many.get("servers", ())), draft.domain_servers()


def _read_line(draft: Draft, where: str, raw: bytes) -> None:
    """Add a line. Raises ConfigError."""
    line = parse_line(where, raw)
    if line is None:
        return
    read = _READERS.get(line.name)
    if read is None:
        raise ConfigError(f"{where}: {line.name[:200]!r}: expected server=VALUE or rev-server=VALUE")
    try:
        read(draft, line.value or "")
    except Rejected as error:
        raise ConfigError(
            f"{where}: {line.name}: invalid value {plain(line.value or '')[:200]!r}; expected {error}"
        ) from None
