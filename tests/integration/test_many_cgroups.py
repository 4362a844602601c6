"""The container of a process that has exited, beside a tree of cgroups that a tenant made."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from attacks import delegated
from machine import own_cgroup
from waiting import wait_for

from udpwatch.agent.attribution import cgroups
from udpwatch.agent.attribution.sender import Roots, Senders
from udpwatch.agent.kernel import cgroup
from udpwatch.agent.model import Cause, Finding, Increase, Verdict

DELEGATED = 9000
CONTAINERS = [f"{number:064x}" for number in range(20)]  # each in a folder of its own, before and after that tree


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """A cgroup with a delegated tree and some containers."""
    with own_cgroup() as root:
        folders = []
        for number, container in enumerate(CONTAINERS):
            folders += [root / f"{number}.slice", root / f"{number}.slice" / container]
        try:
            with delegated(root, DELEGATED):
                for folder in folders:
                    folder.mkdir()
                yield root
        finally:
            for folder in reversed(folders):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def test_9000_cgroups_hide_no_container(tree: Path) -> None:
    with closing(cgroup.find(None)) as watched:
        senders = Senders(Roots(cgroup=Path(f"/proc/self/fd/{watched.fd}")))
        for number, container in enumerate(CONTAINERS):
            folder = tree / f"{number}.slice" / container
            with subprocess.Popen(["true"], preexec_fn=lambda to=folder: _enter(to)) as process:
                process.wait()
            at = folder.stat().st_ino
            finding = Finding("10.0.0.2", "10.0.0.1", 53, 4, Verdict.NEW, Cause.KERNEL_CHOSEN, "true", at, 1)
            assert senders.lookup(Increase(finding, 1, 0, process.pid)).container_id == container
        assert senders.left_out > DELEGATED - cgroups.MAX_CGROUPS


def _enter(folder: Path) -> None:
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def test_end_of_a_container_is_seen_though_only_a_part_of_the_tree_is_watched(tree: Path) -> None:
    """Paths in /proc begin at the root of the tree, not at the cgroup that is watched."""
    folder = tree / "0.slice" / CONTAINERS[0]
    with (
        closing(cgroup.find(str(folder.parent))) as watched,
        closing(watched.open_top()) as top,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=lambda: _enter(folder)) as process,
    ):
        senders = Senders(Roots(cgroup=Path(f"/proc/self/fd/{top.fd}")))
        sender = senders.sender_of(process.pid, "cat", folder.stat().st_ino, 1)
        assert (sender.container_id, sender.process) == (CONTAINERS[0], "cat")
        assert not senders.has_ended(sender, time.monotonic())
        process.communicate()
        wait_for(lambda: _removed(folder), "the container to end")
        assert senders.has_ended(sender, time.monotonic())


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
