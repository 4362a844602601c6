"""Wrong settings on the command line, in variables and in the file: each is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from agents import run_cli
from restricted import assert_refused, run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window=soon"], ["--window", "'soon'", "0.1 to 3600"]),
        (["--window=nan"], ["--window", "'nan'"]),
        (["--metrics-listen=9953"], ["--metrics-listen", "'9953'", "HOST:PORT"]),
        (["--metrics-listen=[::1]:99999"], ["--metrics-listen", "HOST:PORT"]),
        (["--max-peers=-1"], ["--max-peers", "'-1'", "whole number"]),
        (["--metrics-listen=127.0.0.1:" + "9" * 5000], ["--metrics-listen", "HOST:PORT"]),
        (["--cgroup=/tmp"], ["cgroup", "/tmp", "not a cgroup v2 folder"]),
        (["--cgroup=/nowhere"], ["cgroup", "/nowhere", "No such file"]),
        (["--config=/nowhere"], ["--config", "/nowhere", "No such file"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_invalid_flag_is_refused_by_name(folder: Path, flags: list[str], words: list[str]) -> None:
    assert_refused(run(folder, *flags), 2, *words)


def test_invalid_variable_and_file_are_refused_by_name(folder: Path) -> None:
    assert_refused(run(folder, env={"UDPWATCH_WINDOW": "0"}), 2, "UDPWATCH_WINDOW", "'0'")
    settings = folder / "settings.toml"
    settings.write_text("windows = 3\n")
    assert_refused(run(folder, f"--config={settings}"), 2, str(settings), "'windows'", "window")
    settings.write_text("window = \n")
    assert_refused(run(folder, f"--config={settings}"), 2, str(settings), "TOML")
    settings.write_bytes(b"\xff\xfe")
    assert_refused(run(folder, f"--config={settings}"), 2, str(settings))


def test_unknown_command_is_refused() -> None:
    done = run_cli("walk")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_doctor_reads_the_settings_file(folder: Path) -> None:
    (folder / "settings.toml").write_text('cgroup = "/nowhere"\n')
    done = run_cli("doctor", env={"UDPWATCH_CONFIG": str(folder / "settings.toml")})
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
