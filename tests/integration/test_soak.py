"""`make soak` for half a minute: it passes, and what it leaves when it is killed does not stop the next run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from machine import own_cgroup
from repository import ROOT
from waiting import wait_for

from udpwatch.agent.kernel import cgroup
from udpwatch.agent.testing.lab import die_with_parent

SOAK = (sys.executable, "-u", str(ROOT / "tests/soak/run.py"), "--minutes")


def test_everything_at_once_is_counted_exactly() -> None:
    done = subprocess.run([*SOAK, "0.4"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith("every check passed"), done.stdout
    assert "detached 0" not in last, last
    assert "agents 1," not in last, last


def test_killed_soak_leaves_nothing_that_the_next_run_does_not_remove() -> None:
    with closing(cgroup.find(None)) as root:
        cgroups = Path(root.path)
    command = [*SOAK, "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as soak:
        assert soak.stdout
        assert "begin" in soak.stdout.readline()
        namespace = Path(f"/proc/{soak.pid}/ns/mnt").stat().st_ino
        folder = cgroups / f"udpwatch-test-{soak.pid}"
        wait_for(lambda: [each for each in folder.rglob("cgroup.procs") if each.parent != folder], "a pod")
        soak.kill()
    wait_for(lambda: namespace not in set(_mount_namespaces()), "its processes to end")

    def is_removed() -> bool:
        """The kernel may still end them."""
        with own_cgroup():
            return not folder.exists()

    wait_for(is_removed, "the next run to remove its cgroups")


def _mount_namespaces() -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*/ns/mnt"):
        try:
            yield process.stat().st_ino
        except OSError:  # it has ended
            continue
