"""Errors with dnsmasq's exit statuses (dnsmasq(8), EXIT CODES), so that service managers can distinguish them."""

from __future__ import annotations

from collections.abc import Sequence


class DnsError(Exception):
    """One line: what failed, why, and what to do."""

    exit_status = 5


class ConfigError(DnsError):
    """An invalid option or line of a configuration file."""

    exit_status = 1


class NetworkError(DnsError):
    """An address that cannot be bound."""

    exit_status = 2


class FileError(DnsError):
    """A configured file or folder that cannot be read."""

    exit_status = 3


class HostsError(FileError):
    """Hosts files that cannot be read: a description of the first, and the number of others."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.files = len(problems)
