"""`make test-bare` leaves nothing behind, however it ends; what it runs is tested by running it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bare

#: A run that stands still once it has a namespace, a mount in it and a process: argv is the folder, and the program.
RUN = f"""
import subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(bare.__file__).parent)!r})
import bare
with bare.guarded(Path(sys.argv[1])) as folder:
    (folder / "mounted").mkdir()
    bare._mount("--bind", str(Path(sys.argv[2]).parent), str(folder / "mounted"))
    print(subprocess.Popen(sys.argv[2:]).pid, flush=True)
    time.sleep(1000)
"""


@contextmanager
def run(place: Path, *program: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield the run, and the process ID of its program."""
    command = [sys.executable, "-c", RUN, str(place), *program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.fixture
def sleep(folder: Path) -> Path:
    """A program, beside a file that no clean-up may remove."""
    (folder / "kept").mkdir()
    (folder / "kept/file").touch()
    return Path(shutil.copy(shutil.which("sleep") or "", folder / "kept"))


def test_killed_run_leaves_nothing(folder: Path, sleep: Path) -> None:
    place = folder / "bookworm"
    with run(place, str(sleep), "1000") as (process, pid):
        assert place.exists()
        process.kill()
        wait_for(lambda: not place.exists(), "the guardian to remove the folder")
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the program to end")
    assert (sleep.parent / "file").exists()
    with run(place, str(sleep), "1000"):  # it needs the same lock
        assert place.exists()


def test_second_run_of_a_release_is_refused(folder: Path, sleep: Path) -> None:
    place = folder / "bookworm"
    with run(place, str(sleep), "1000"), pytest.raises(bare.Unavailable, match="another test-bare is using it"):
        with bare.guarded(place):
            pass


def test_next_run_removes_what_a_killed_guardian_left(folder: Path) -> None:
    """The processes are found by their root."""
    place = folder / "bookworm"
    (place / "root").mkdir(parents=True)
    busybox = shutil.which("busybox")
    if not busybox:
        pytest.skip("needs a static busybox: apt-get install busybox-static")
    shutil.copy(busybox, place / "root/busybox")
    with subprocess.Popen(["/busybox", "sleep", "1000"], preexec_fn=lambda: os.chroot(place / "root")) as left:
        bare.sweep(place)
        assert left.wait() == -signal.SIGKILL
    assert not place.exists()
