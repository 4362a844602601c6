"""One option of `udpwatch dns`: a row of option_table.py or of other_options.py."""

from __future__ import annotations

from dataclasses import dataclass

from udpwatch.dns.option_readers import Read

_SHORT_WITH_VALUE = tuple("l3xg")


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its name, how to read it, and its documentation."""

    name: str
    short: str  # dnsmasq's short option; "": none
    value: str  # format of the value; "": none; "[=..]": optional, in the same argument
    read: Read
    help: str
    differs: str = ""  # difference from dnsmasq
    once: bool = False  # may not be repeated, as in dnsmasq
    command_line_only: bool = False

    @property
    def flag(self) -> str:
        """The option with the format of its value."""
        return f"--{self.name}" + (
            self.value if self.value.startswith("[=") else f"={self.value}" if self.value else ""
        )

    @property
    def needs_value(self) -> bool:
        """Whether the value is required."""
        return bool(self.value) and not self.value.startswith("[=")

    @property
    def short_needs_value(self) -> bool:
        """Whether the short option requires the value, also where the long one does not."""
        return self.needs_value or self.short in _SHORT_WITH_VALUE


def option(
    usage: str, read: Read, help_: str, differs: str = "", once: bool = False, command_line_only: bool = False
) -> Option:
    """Create a row. ``usage`` is ``[-LETTER ]--NAME[=VALUE]``; an optional value is written ``[=VALUE]``."""
    short, _, long = usage.rpartition("--")
    name = long.partition("=")[0].removesuffix("[")
    value = long[len(name) :].removeprefix("=")
    return Option(name, short.strip("- "), value, read, help_, differs, once, command_line_only)
