"""`udpwatch dns` as a process: its pid file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from udpwatch.agent.commands.dns import remove_pid, write_pid
from udpwatch.dns.errors import FileError


def test_pid_file_replaces_an_old_one(tmp_path: Path) -> None:
    file = tmp_path / "dns.pid"
    for _ in range(2):
        write_pid(file)
        assert file.read_text() == f"{os.getpid()}\n"
    remove_pid(file)
    assert not file.exists()
    remove_pid(file)


def test_pid_file_does_not_follow_a_symbolic_link(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "dns.pid"
    victim.write_text("precious")
    file.symlink_to(victim)
    write_pid(file)
    assert victim.read_text() == "precious"
    assert not file.is_symlink()


@pytest.mark.parametrize("path", ["/nowhere/dns.pid", "/proc"])
def test_pid_file_that_cannot_be_written(path: str) -> None:
    with pytest.raises(FileError, match=f"^pid-file: cannot write {path}: ") as caught:
        write_pid(Path(path))
    assert caught.value.exit_status == 3
