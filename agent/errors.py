"""The errors, by exit status. A message is one line: `cannot VERB THING: REASON; HINT`."""

from __future__ import annotations


class UdpwatchError(Exception):
    """udpwatch failed."""

    exit_status = 1


class UsageError(UdpwatchError):
    """Wrong usage: a flag, an environment variable or a line of the settings file."""

    exit_status = 2


class CannotRun(UdpwatchError):
    """This machine or this user cannot run udpwatch. 77 means "skipped" to test harnesses."""

    exit_status = 77
