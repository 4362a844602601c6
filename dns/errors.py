"""What can go wrong, with dnsmasq's exit statuses (dnsmasq(8), EXIT CODES), so that what starts it can tell."""

from __future__ import annotations

from collections.abc import Sequence


class DnsError(Exception):
    """One line: the thing that failed, the reason, and the way out."""

    exit_status = 5


class ConfigError(DnsError):
    """An option, or a line of a configuration file."""

    exit_status = 1


class NetworkError(DnsError):
    """An address that cannot be had."""

    exit_status = 2


class FileError(DnsError):
    """A file or folder that is named in the configuration and cannot be read."""

    exit_status = 3


class HostsError(FileError):
    """Hosts files that cannot be read: the first one in words, and how many there are."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.files = len(problems)
