"""`udpwatch run`: the agent in the foreground."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from udpwatch.agent.config import SETTINGS, resolve
from udpwatch.agent.daemon import app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for each setting."""
    parser.description = (
        "Watch every UDP reply of this node until stopped (SIGTERM, Ctrl-C). Each flag can also be set by an "
        "environment variable UDPWATCH_NAME or in the settings file; flags override variables, variables override "
        "the file."
    )
    parser.add_argument("--config", metavar="FILE", help="settings file (TOML: name = value)")
    for setting in SETTINGS:
        default = "" if setting.default is None else f" [{setting.default}]"
        if setting.metavar:
            parser.add_argument(setting.flag, dest=setting.name, metavar=setting.metavar, help=setting.help + default)
        else:
            switch = argparse.BooleanOptionalAction
            parser.add_argument(
                setting.flag, dest=setting.name, action=switch, default=None, help=setting.help + default
            )


def run(parsed: argparse.Namespace) -> int:
    """Run the agent until it is stopped."""
    flags = {setting.name: getattr(parsed, setting.name) for setting in SETTINGS}
    app.run(resolve(flags, os.environ, settings_file(parsed)))
    return 0


def settings_file(parsed: argparse.Namespace) -> Path | None:
    """The settings file of --config, or of UDPWATCH_CONFIG."""
    file = parsed.config or os.environ.get("UDPWATCH_CONFIG")
    return Path(file) if file else None
