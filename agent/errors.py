"""What can go wrong, by what the shell should be told. cli.py alone prints and exits.

A message is one line: the thing that failed, the reason, and the way out.
"""

from __future__ import annotations


class UdpwatchError(Exception):
    """It failed."""

    exit_status = 1


class UsageError(UdpwatchError):
    """Wrong usage: a flag, an environment variable or a line of the settings file."""

    exit_status = 2


class CannotRun(UdpwatchError):
    """This machine, or this user on it, cannot run udpwatch; 77 as test harnesses use it for "skipped"."""

    exit_status = 77
