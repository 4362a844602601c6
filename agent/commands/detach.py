"""`udpwatch detach`: removes what an agent has kept with --state."""

from __future__ import annotations

import argparse
from pathlib import Path

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel.pins import DEFAULT_FOLDER, opened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder."""
    parser.description = (
        "Detach and remove the programs and counts that an agent has kept with --state, for example before udpwatch is "
        "uninstalled. Stop the agent first."
    )
    parser.add_argument(
        "--state", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help=f"the agent's state folder [{DEFAULT_FOLDER}]"
    )


def run(parsed: argparse.Namespace) -> int:
    """Remove it, and print what was removed. Raises UdpwatchError."""
    folder: Path = parsed.state
    try:
        if not folder.exists():
            print(f"nothing to detach: {folder} does not exist")
            return 0
        with opened(folder) as pins:
            removed = pins.remove()
    except OSError as error:
        raise UdpwatchError(f"cannot remove {error.filename or folder}: {error.strerror}; run this as root") from None
    print(f"detached: {removed} programs, maps and links in {folder} were removed")
    if folder.exists() and any(folder.iterdir()):
        print(f"{folder} stays: it holds other objects")
    return 0
