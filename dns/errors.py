"""What can go wrong, with dnsmasq's exit statuses (dnsmasq(8), EXIT CODES), so that what starts it can tell."""

from __future__ import annotations


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
