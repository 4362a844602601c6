"""The budget of lookups: what a flood of process ids costs, and which senders wait for it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from udpwatch.agent.attribution import budget, process, sender
from udpwatch.agent.attribution.budget import Budget
from udpwatch.agent.attribution.sender import RETRY_SECONDS, Roots, Senders
from udpwatch.agent.model import Cause, Finding, Increase, Sender, Verdict

FLOOD, QUIET = "3f2a" * 16, "0b1c" * 16
PER_SECOND = 1400  # wrong replies that one container sent through as many process ids


class Host:
    """Containers of Docker; each has one process with many threads, whose id is the number of its cgroup."""

    def __init__(self, root: Path) -> None:
        self.roots = Roots(root / "proc", root / "log", root / "docker", root / "cgroup")
        for folder in (self.roots.proc, self.roots.log, self.roots.docker, self.roots.cgroup):
            assert folder
            folder.mkdir()
        self.senders = Senders(self.roots)

    def container(self, number: str, name: str = "") -> int:
        """Make a container; returns the id of its cgroup."""
        assert self.roots.cgroup
        folder = self.roots.cgroup / "docker" / number
        folder.mkdir(parents=True)
        if name:
            (self.roots.docker / "containers" / number).mkdir(parents=True)
            (self.roots.docker / "containers" / number / "config.v2.json").write_text(json.dumps({"Name": name}))
        return folder.stat().st_ino

    def process(self, pid: int, number: str) -> None:
        folder = self.roots.proc / str(pid)
        for thread in range(process.MAX_THREADS):
            (folder / "task" / str(thread)).mkdir(parents=True)
            (folder / "task" / str(thread) / "comm").write_text("worker\n")
        (folder / "comm").write_text("server\n")
        (folder / "cgroup").write_text(f"0::/docker/{number}\n")
        (folder / "cmdline").write_bytes(b"server\0-v\0")
        (folder / "stat").write_text(f"{pid} (server) S 1 0")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def seen(cgroup: int, pid: int, comm: str = "server") -> Increase:
    finding = Finding("10.0.0.2", "10.0.0.1", 53, 4, Verdict.NEW, Cause.KERNEL_CHOSEN, comm, cgroup, 1)
    return Increase(finding, 1, 0, pid)


def test_flood_of_process_names_costs_no_more_than_the_budget(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the budget, each name that a process sends under would cost as many reads as it has threads."""
    cgroup = host.container(FLOOD)
    host.process(7, FLOOD)
    reads = []
    name = process._name
    monkeypatch.setattr(process, "_name", lambda path: reads.append(path) or name(path))
    for number in range(10 * PER_SECOND):
        found = host.senders.lookup(seen(cgroup, 7, f"x{number}"), number / PER_SECOND)
        assert (found.process, found.pid, found.container) == (f"x{number}", 7, FLOOD[:12])
    lookups = budget.BURST_OF_A_TENANT + 10 * budget.PER_SECOND_OF_A_TENANT
    assert len(reads) <= lookups * (1 + process.MAX_THREADS)
    assert abs(host.senders.deferred - (10 * PER_SECOND - lookups)) <= 1


def test_quiet_container_is_looked_up_while_others_flood(host: Host) -> None:
    """The floods come from as many containers as use up all lookups."""
    floods = [host.container(f"{number:064x}") for number in range(50)]
    quiet = host.container(QUIET, "/web-1")
    host.process(8, QUIET)
    for step in range(PER_SECOND):
        host.senders.lookup(seen(floods[step % 50], 1000 + step), 10 + step / PER_SECOND)
    deferred = host.senders.deferred
    assert deferred > PER_SECOND - budget.BURST - budget.PER_SECOND
    found = host.senders.lookup(seen(quiet, 8), 11)
    assert (found.process, found.command, found.container) == ("server", "server -v", "web-1")
    assert host.senders.deferred == deferred


def test_deferred_sender_is_looked_up_later(host: Host) -> None:
    cgroup = host.container(FLOOD, "/web-1")
    host.process(7, FLOOD)
    for number in range(budget.BURST_OF_A_TENANT):
        host.senders.lookup(seen(cgroup, 1000 + number), 0)
    found = host.senders.lookup(seen(cgroup, 7, "worker"), 0)
    assert (found.process, found.command, found.container) == ("worker", "", "web-1")
    assert host.senders.deferred == 1
    found = host.senders.lookup(seen(cgroup, 7, "worker"), 1)
    assert (found.process, found.command, found.container) == ("server", "server -v", "web-1")
    assert host.senders.deferred == 1


def test_known_sender_costs_no_lookup(host: Host) -> None:
    cgroup = host.container(FLOOD, "/web-1")
    host.process(7, FLOOD)
    known = host.senders.lookup(seen(cgroup, 7), 0)
    for number in range(PER_SECOND):
        host.senders.lookup(seen(cgroup, 1000 + number), 0)
    deferred = host.senders.deferred
    assert host.senders.lookup(seen(cgroup, 7), 0) == known
    assert host.senders.deferred == deferred


def test_deferred_sender_has_the_name_and_cgroup_path_that_the_kernel_gave(host: Host) -> None:
    cgroup = host.container(FLOOD)
    for _ in range(budget.BURST_OF_A_TENANT):
        assert host.senders._budget.take(f"/docker/{FLOOD}", 0)
    assert host.senders.lookup(seen(cgroup, 7, ""), 0) == Sender(
        "unknown",
        7,
        cgroup=f"/docker/{FLOOD}",
        runtime="docker",
        container_id=FLOOD,
        container=FLOOD[:12],
    )


def test_namespaces_share_the_budget_when_all_cgroups_are_the_root(tmp_path: Path) -> None:
    """This is so on hosts with cgroup v1."""
    (tmp_path / "proc").mkdir()
    senders = Senders(Roots(tmp_path / "proc"))
    for number in range(2 * budget.BURST_OF_A_TENANT):
        senders.lookup(seen(0, number + 1), 0)
    assert senders.deferred == budget.BURST_OF_A_TENANT
    finding = Finding("10.0.0.2", "10.0.0.1", 53, 4, Verdict.NEW, Cause.KERNEL_CHOSEN, "server", 0, 2)
    senders.lookup(Increase(finding, 1, 0, 1), 0)
    assert senders.deferred == budget.BURST_OF_A_TENANT


def test_missing_name_is_looked_up_less_and_less_often(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup = host.container(FLOOD)  # without a file of Docker's
    host.process(7, FLOOD)
    looked = []
    look = Senders._resolve
    monkeypatch.setattr(Senders, "_resolve", lambda self, *key: looked.append(key[-1]) or look(self, *key))
    for tenth in range(600):
        host.senders.lookup(seen(cgroup, 7), tenth / 10)
    waits = [later - earlier for earlier, later in pairwise(looked)]
    assert waits == pytest.approx([RETRY_SECONDS * 2**number for number in range(5)])


def test_memory_is_bounded_in_a_long_flood(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_TENANTS", 10)
    spent = Budget()
    for number in range(1000):
        spent.take(f"/{number}", number)
    assert len(spent._tenants) == 10
    cgroup = host.container(FLOOD)
    for number in range(20_000):
        host.senders.lookup(seen(cgroup, number + 1), number / 100)
    kept = budget.BURST_OF_A_TENANT + sender.KEEP_SECONDS * budget.PER_SECOND_OF_A_TENANT
    assert len(host.senders._cache) <= kept + 1


def test_cache_holds_all_that_the_budget_allows() -> None:
    """So a flood cannot evict the senders of others."""
    assert sender.MAX_SENDERS > budget.BURST + budget.PER_SECOND * sender.KEEP_SECONDS


def test_budget_works_while_the_clock_stands_still() -> None:
    spent = Budget()
    assert sum(spent.take("/a", 5.0) for _ in range(1000)) == budget.BURST_OF_A_TENANT
    assert not spent.take("/a", 4.0)
    assert spent.take("/a", 6.0)
