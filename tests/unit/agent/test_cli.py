"""The command line, before any command runs."""

from __future__ import annotations

import pytest

from udpwatch.agent.cli import COMMANDS, main


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"dns"}))
def test_unknown_option_shows_the_usage_of_its_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: udpwatch {command} ")
    assert error.endswith(f"udpwatch {command}: error: unrecognized arguments: --no-such-option\n")
