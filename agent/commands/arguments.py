"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable

MOST_SECONDS = 3600


def seconds(least: float) -> Callable[[str], float]:
    """Return what argparse calls to convert a number of seconds from ``least`` to an hour."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not least <= number <= MOST_SECONDS:
            raise argparse.ArgumentTypeError(
                f"invalid value {text!r}: expected a number from {least} to {MOST_SECONDS}"
            )
        return number

    return convert


def port(text: str) -> int:
    """Convert a port number, for argparse."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"invalid port {text!r}: expected a number from 1 to 65535")
    return int(text)
