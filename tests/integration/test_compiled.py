"""The compile cache: a start uses the programs of an earlier one unless another user could have changed them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agents import Agent, temporary
from restricted import NOBODY, assert_refused, in_mount_namespace, run
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost

WITHOUT_BCC = in_mount_namespace("mount -t tmpfs none /usr/lib/python3/dist-packages/bcc")


@pytest.fixture(scope="module")
def compiled() -> Iterator[Path]:
    """A cache as one start leaves it."""
    with temporary() as folder, Agent(Path(folder), f"--cache={folder}/cache"):
        yield Path(folder, "cache")


@pytest.fixture
def kept(compiled: Path, folder: Path) -> Path:
    """A copy of that cache for one test."""
    return shutil.copytree(compiled, folder / "cache")


def test_second_start_needs_no_bcc(kept: Path, folder: Path, host: ContainerHost, port: int) -> None:
    with Agent(folder, f"--cache={kept}", wrapper=WITHOUT_BCC) as agent:
        wrong_replies(host, port)
        assert agent.counted(port, 1) == 1


@pytest.mark.parametrize("flag", ["--window=29", "--max-peers=1024", "--events-per-second=9"])
def test_other_settings_are_compiled_again(kept: Path, folder: Path, flag: str) -> None:
    assert_refused(run(folder, f"--cache={kept}", flag, wrapper=WITHOUT_BCC), 77, "cannot import bcc")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes().replace(b"b7", b"b6", 1)),
        lambda path: os.chown(path, NOBODY, NOBODY),
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
    ],
    ids=["damaged", "another owner", "others may write", "others may write to the folder"],
)
def test_file_that_others_could_have_written_is_not_used(
    kept: Path, folder: Path, spoil: Callable[[Path], object]
) -> None:
    """Root would load it into the kernel."""
    for path in kept.iterdir():
        spoil(path)
    assert_refused(run(folder, f"--cache={kept}", wrapper=WITHOUT_BCC), 77, "cannot import bcc")


def test_unused_file_is_compiled_again(kept: Path, folder: Path) -> None:
    for path in kept.iterdir():
        path.chmod(0o666)
    with Agent(folder, f"--cache={kept}"):
        assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}


@pytest.mark.parametrize("place", ["read-only", "/proc/nowhere"])
def test_unwritable_cache_is_ignored(folder: Path, place: str) -> None:
    """The agent works, a compilation later, and logs nothing."""
    cache = folder / place
    (folder / "read-only").mkdir()
    wrapper = in_mount_namespace(f"mount -t tmpfs -o ro none {folder}/read-only")
    with Agent(folder, f"--cache={cache}", wrapper=wrapper) as agent:
        assert not [line for line in agent.log if "cache" in line]


def test_systemds_cache_folder_is_used(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "UDPWATCH_CACHE"}
    with Agent(folder, env={**environment, "CACHE_DIRECTORY": f"{folder}/cache:{folder}/other"}):
        assert list((folder / "cache").iterdir())
