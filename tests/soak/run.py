"""`make soak`: everything at once, for as long as you like, and every count is exact.

Around steady traffic of wrong and right servers with an agent that watches them: queries to its DNS responder, its
event file, a follower of its events, scrapes, a `udpwatch top`, pods that come and go, programs detached by others, and
in the middle of the run agents that are ended, killed, upgraded and started again. A line of figures is printed each
minute. At the end, each reason for which the run failed is named, and the exit status is 1 if there is any.

Nothing of this is left on the machine, even by SIGKILL: processes end with this one, and with the last of them its
namespaces and mounts, which hold all files. The next run removes the cgroup.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import churn
import figures
import traffic
from agents import before_all, run_cli
from dns_server import write
from machine import own_cgroup
from next_version import make_next_version
from scene import host_with_more_addresses
from scene_agent import InNamespace
from scrapes import CHECKED, LOST, REATTACHED, WRONG, Scrapes
from tally import Tally
from terminals import Terminal, top
from waiting import wait_for

from udpwatch.agent.errors import CannotRun
from udpwatch.agent.kernel.programs import HOOKS
from udpwatch.agent.testing.child import Child
from udpwatch.agent.testing.lab import ContainerHost

SCRAPE_SECONDS = 1.0
STEADY_SECONDS = 60.0  # an agent that lives shorter still fills its caches and opens its sockets
LOOKS = 100  # at the agent's figures, of an agent that lives for a third of the run
COUNT_SECONDS = 60.0  # for the last counts to be in a scrape
#: part of the run in which agents are ended and killed; before and after it, one agent lives for 40 % of the run
RESTARTS_FROM, RESTARTS_TO = 0.4, 0.6
ALONE_SECONDS = 2.0  # at most, without an agent
FORGET_SECONDS = 60  # then the number of series is steady after a minute
WINDOW_SECONDS = 5  # how long the programs of another version learn
HELD_EVENTS = 100  # at most, that an agent has taken from the kernel and not yet written
LOST_STAGES = ("rate_limit", "ring_full", "findings_full", "queue", "output")

_CLONE_NEWNS = 0x20000
_libc = ctypes.CDLL(None, use_errno=True)


class Every:
    """Something to do each so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def is_due(self) -> bool:
        """Return whether it is to be done now."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._seconds
        return True


class Soak:
    """One run."""

    def __init__(self, host: ContainerHost, folder: Path, cgroup: Path, tally: Tally, seconds: float) -> None:
        self.problems: list[str] = []
        self._host, self._folder, self._cgroup, self._tally, self._seconds = host, folder, cgroup, tally, seconds
        self._pods, self._queries = folder / "pods.jsonl", folder / "query-problems"
        self._scrapes, self._objects = Scrapes(), figures.Objects()
        self._samples: list[figures.Figures] = []
        self._first: list[figures.Figures] = []
        self._latest: figures.Figures | None = None
        self._agents = self._kills = self._detached = 0
        self._state = folder / "bpf/udpwatch"
        self._next_version = make_next_version(folder / "next")

    # ---- the agent and its clients ----

    def _start_agent(self, version: Path | None = None) -> None:
        """Start an agent; ``version``: a folder with another version of udpwatch."""
        self._agents += 1
        flags = (
            f"--dns-conf={self._folder}/dns.conf",
            f"--cgroup={self._cgroup}",
            f"--cache={self._folder}/cache",
            f"--state={self._state}",
            f"--window={WINDOW_SECONDS}",
            f"--forget={FORGET_SECONDS}",
        )
        env = os.environ | (before_all(version) if version else {})
        self._agent = InNamespace(self._host, self._folder, *flags, env=env)
        self._objects.look(self._agent.pid)
        self._tally["agent"] = self._agents
        self._follow()

    def _stop_agent(self, number: int) -> None:
        self._objects.look(self._agent.pid)
        self._tally["agent"] = 0
        status = self._agent.stop(number)
        expected = -number if number == signal.SIGKILL else 0
        if status != expected:
            self._fail(f"the agent ended with status {status} after signal {number}: {self._agent.last_message}")
        if any("Traceback" in line for line in self._agent.log):
            self._fail("the agent logged a traceback: " + "\n".join(self._agent.log))
        self._kills += number == signal.SIGKILL
        self._scrapes.agent_ended()

    def _follow(self) -> None:
        """Follow events as a user does, until the agent ends."""
        with (self._folder / "followed").open("a") as output:
            command = ("events", "--json", f"--connect={self._agent.socket}")
            self._follower = Child(*command, stdout=output, keep_lines=5)

    def _restart(self, number: int, version: Path | None) -> None:
        """End the agent, and start the next one after a while; traffic continues."""
        self._stop_agent(number)
        self._follower.stop()
        time.sleep(random.uniform(0, ALONE_SECONDS))  # noqa: S311
        self._start_agent(version)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Pause the counted traffic during the body, and compare all counts before it."""
        self._tally.pause()
        try:
            self._compare()
            yield
        finally:
            self._tally.resume()

    def _detach(self) -> None:
        """Detach one of the agent's programs, as another program may, and wait until it is attached again. Replies that
        no program sees cannot be counted, so there are none meanwhile.
        """
        program, hook = random.choice(HOOKS)  # noqa: S311
        with self._quiet():
            before = self._scrapes.sum(REATTACHED)
            for info in Path(f"/proc/{self._agent.pid}/fdinfo").iterdir():
                text = info.read_text() if info.exists() else ""
                found = re.search(r"^link_id:\s+(\d+)$", text, re.MULTILINE)
                if found and f"attach_type:\t{int(hook.attach)}\n" in text:
                    figures.detach(int(found.group(1)))
            self._wait(lambda: self._scrapes.sum(REATTACHED) > before, f"{program.name} to be attached again")
        self._detached += 1

    # ---- the counts ----

    def _fail(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            print(f"soak: FAILED: {problem}", flush=True)

    def _scrape(self) -> None:
        status, text = self._agent.get("/metrics")
        if status != 200:
            self._fail(f"a scrape got status {status}")
            return
        self._scrapes.read(text)
        for each in self._scrapes.fallen:
            self._fail(each)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Scrape until the condition is true; fail when that takes too long."""
        end = time.monotonic() + COUNT_SECONDS
        self._scrape()
        while not condition():
            if time.monotonic() > end:
                self._fail(f"still waiting for {what} after {COUNT_SECONDS:.0f} s")
                return
            time.sleep(0.2)
            self._scrape()

    def _sent(self) -> dict[int, int]:
        """Return the wrong replies of all servers so far, by port."""
        sent = {server.port: 0 if server.is_right else self._tally[server.name] for server in traffic.SERVERS}
        return sent | churn.read(self._pods)

    def _counted(self, port: int) -> int:
        return max(self._scrapes.sum(WRONG, "port", str(port)), self._scrapes.highest[port])

    def _compare(self) -> None:
        """Compare every count with what was sent, while nothing is."""
        sent = self._sent()
        self._wait(
            lambda: all(self._counted(port) >= count for port, count in sent.items()), "the last replies to count"
        )
        for port, count in sent.items():
            if (counted := self._counted(port)) != count:
                self._fail(f"port {port}: {counted:,} wrong replies counted, {count:,} sent")
        if foreign := [port for port in self._scrapes.highest if port not in sent]:
            self._fail(f"wrong replies of servers that sent none: ports {foreign}")
        self._compare_checked(sum(sent.values()))

    def _compare_checked(self, wrong: int) -> None:
        """Check the number of all replies. A client's next request after a right reply counts as a reply to it; others
        are those of the responder and of its upstream server, and the agent's self-tests.
        """
        checked = self._scrapes.sum(CHECKED)
        right = sum(self._tally[server.name] for server in traffic.SERVERS if server.is_right)
        few, many = wrong + right, wrong + 2 * right + 2 * churn.MOST_REPLIES * len(self._sent())
        many += 3 * self._tally["asked"] + 10 * self._agents + int(self._seconds)
        if not few <= checked <= many:
            self._fail(f"{checked:,} replies were checked, expected {few:,} to {many:,}")

    def _compare_events(self) -> None:
        """Each wrong reply is in the file, or counted as lost, but for those that a killed agent held."""
        sent, may_miss = sum(self._sent().values()), self._kills * HELD_EVENTS
        file, followed = self._folder / "events.jsonl", self._folder / "followed"
        self._wait(lambda: sent - may_miss <= _lines(file) + sum(self._lost().values()), "the last events")
        written = {_identity(line) for line in file.read_text().splitlines()}
        if _lines(file) + sum(self._lost().values()) > sent:
            self._fail(f"{sent:,} events, but {_lines(file):,} were written and {self._lost()} lost")
        if len(written) < _lines(file):
            self._fail(f"{_lines(file) - len(written):,} events were written twice")
        foreign = [line for line in followed.read_text().splitlines() if _identity(line) not in written]
        if not _lines(followed) or len(foreign) > may_miss:
            self._fail(f"{_lines(followed):,} events were followed, {len(foreign):,} of them not in the file")
        if undecided := self._scrapes.sum(LOST, "stage", "undecided"):
            self._fail(f"{undecided:,} replies were undecided")

    def _lost(self) -> dict[str, int]:
        return {stage: self._scrapes.sum(LOST, "stage", stage) for stage in LOST_STAGES}

    # ---- the run ----

    def run(self, ready: Callable[[], None]) -> None:
        """Run everything; fills ``problems``. Calls ``ready`` when all of it is at work."""
        with ExitStack() as stack:
            self._start_agent()
            self._tally.resume()
            stack.callback(lambda: self._agent.stop(signal.SIGKILL))
            stack.callback(lambda: self._follower.stop(signal.SIGKILL))
            self._top = stack.enter_context(Terminal(self._folder, *top(f"--connect={self._agent.socket}")))
            self._top.shows(*(f" {server.port} " for server in traffic.SERVERS if not server.is_right))
            self._top_pid = self._top.pid
            links = len(self._interfaces())
            ready()
            self._run()
            self._tally["ending"] = 1
            wait_for(lambda: self._tally["pods ended"], "the pods to end")
            self._tally.pause()
            self._compare()
            self._compare_dns()
            if self._top.pid != self._top_pid or not all(
                f" {server.port} " in self._top.text for server in traffic.SERVERS if not server.is_right
            ):
                self._fail(f"`udpwatch top` does not show the servers any more:\n{self._top.text}")
            self._compare_events()
            self._stop_agent(signal.SIGTERM)
            done = run_cli("detach", f"--state={self._state}")
            if done.returncode or self._state.exists():
                self._fail(f"`udpwatch detach` did not remove {self._state}: {done.stderr}")
            if len(self._interfaces()) > links:
                self._fail(f"network namespaces of pods are left: {self._interfaces()}")

    def check_left(self) -> None:
        """Call this when everything has ended and its mounts are gone."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self._objects.left(), "the kernel to free BPF objects", COUNT_SECONDS)
        if left := self._objects.left():
            self._fail(f"BPF objects are left: {', '.join(left)}")

    def _run(self) -> None:
        begin = time.monotonic()
        scrape, look, minute = Every(SCRAPE_SECONDS), Every(self._seconds / 2.5 / LOOKS), Every(60)
        detach = Every(min(60.0, max(8.0, self._seconds / 13)))
        restart = Every(min(12.0, max(1.0, self._seconds / 60)))
        restarts = itertools.cycle(
            (
                (signal.SIGTERM, self._next_version),
                (signal.SIGKILL, self._next_version),
                (signal.SIGTERM, None),
                (signal.SIGKILL, None),
            )
        )
        while (passed := time.monotonic() - begin) < self._seconds:
            time.sleep(0.05)
            if scrape.is_due():
                self._scrape()
            if look.is_due():
                self._look()
            if detach.is_due():
                self._detach()
            if RESTARTS_FROM < passed / self._seconds < RESTARTS_TO and restart.is_due():
                self._check_growth()
                self._restart(*next(restarts))
            if minute.is_due():
                print(f"soak: {passed / 60:3.0f} min: {self.line()}", flush=True)
            if self._agent.process.poll() is not None:
                self._fail(f"the agent ended by itself: {self._agent.last_message}")
                return
        self._check_growth()

    def _interfaces(self) -> list[str]:
        with self._host.node.entered():
            return [name for _, name in socket.if_nameindex()]

    def _look(self) -> None:
        places = (self._state, self._cgroup, len(self._interfaces()))
        self._latest = figures.look(self._agent.pid, self._top_pid, self._objects, *places)
        self._samples.append(self._latest)

    def _check_growth(self) -> None:
        """Judge the figures of an agent that has lived for long: its last third against its second one, and against the
        last third of the first agent. Forget them.
        """
        third = len(self._samples) // 3
        if len(self._samples) >= LOOKS // 2 and self._seconds / 2.5 >= STEADY_SECONDS:
            latest = self._samples[2 * third :]
            for before in filter(None, (self._samples[third : 2 * third], self._first)):
                for problem in figures.growth(before, latest):
                    self._fail(problem)
            self._first = self._first or latest
        self._samples.clear()

    def _compare_dns(self) -> None:
        asked, answered = self._tally["asked"], self._tally["answered"]
        if asked != answered or not asked:
            problems = self._queries.read_text() if self._queries.exists() else ""
            self._fail(f"{asked:,} queries, {answered:,} right responses: {problems}")

    def line(self) -> str:
        """Return the figures so far."""
        sent = self._sent()
        counted = sum(self._counted(port) for port in sent)
        right = sum(self._tally[server.name] for server in traffic.SERVERS if server.is_right)
        parts = [
            f"wrong {counted:,} counted of {sum(sent.values()):,}",
            f"right {right:,}",
            f"queries {self._tally['answered']:,} of {self._tally['asked']:,}",
            f"pods {len(sent) - len(traffic.SERVERS)}",
            f"scrapes {self._scrapes.number:,}",
            f"agents {self._agents}",
            f"detached {self._detached}",
        ]
        if now := self._latest:
            parts.append(
                f"{now.memory_kib / 1024:.1f} MB, {now.descriptors} descriptors, {now.threads} threads, {now.programs}"
                f" programs, {now.maps} maps, {now.links} links, {now.pins} pins; top {now.top_kib / 1024:.1f} MB"
            )
        return ", ".join(parts)


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def _identity(line: str) -> tuple[object, ...]:
    """Return what no other event has. Another version's programs begin `count` at 1, and clients use a port again."""
    event = json.loads(line)
    return tuple(event[key] for key in ("time", "expected", "actual", "port", "peer", "peer_port", "count"))


@contextlib.contextmanager
def _private_files() -> Iterator[tuple[Path, Path]]:
    """Yield (a folder, its folder of logs) in mounts that no other process sees, and that end with this one.

    The agent reads the names of pods under /var/log.
    """
    if _libc.unshare(_CLONE_NEWNS):
        raise CannotRun("cannot make a mount namespace; run this as root")
    log = Path("/var/log")
    for words in (("--make-rprivate", "/"), ("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(log))):
        subprocess.run(["mount", *words], check=True)
    folder = log / "soak"
    folder.mkdir()
    (folder / "bpf").mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(folder / "bpf")], check=True)
    yield folder, log


def main() -> int:
    """Return 0 if every check passed, 1 if not, 77 if this machine cannot run it."""
    parser = argparse.ArgumentParser(description="run everything at once and check that every count is exact")
    parser.add_argument("--minutes", type=float, default=10.0)
    seconds = parser.parse_args().minutes * 60
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    tally = Tally([*traffic.NUMBERS, "ending", "pods ended"], [*traffic.CLIENTS, churn.GUEST])
    try:
        with own_cgroup() as cgroup:
            home = _enter(cgroup)
            try:
                with _private_files() as (folder, log):
                    with host_with_more_addresses() as host:
                        # Else it is the lowest of its members', and changes as pods come and go.
                        host.node.ip("link set docker0 address 02:42:ac:11:00:01")
                        hosts = write(
                            folder / "hosts", *(f"{address} {name}" for name, address in traffic.HOSTS.items())
                        )
                        lines = ("no-hosts", "no-resolv", f"addn-hosts={hosts}", f"server={host.OUTSIDE}")
                        write(folder / "dns.conf", *lines)
                        traffic.start(host, tally, folder / "query-problems")
                        host.node.spawn(
                            "soak-pods", functools.partial(churn.run, host, cgroup, log, folder / "pods.jsonl", tally)
                        )
                        soak = Soak(host, folder, cgroup, tally, seconds)
                        soak.run(lambda: print(f"soak: {seconds / 60:g} minutes begin", flush=True))
                        line = soak.line()
                soak.check_left()
            finally:
                home.write_text(str(os.getpid()))
    except CannotRun as error:
        print(f"soak: {error}", file=sys.stderr)
        return CannotRun.exit_status
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return 130
    result = f"{len(soak.problems)} checks FAILED" if soak.problems else "every check passed"
    print(f"soak: {(time.monotonic() - begin) / 60:.1f} min in all: {line}: {result}")
    return 1 if soak.problems else 0


def _enter(cgroup: Path) -> Path:
    """Move this process into a cgroup; return the list of members of the one that it was in."""
    (path,) = re.findall(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    return cgroup.parent / path.lstrip("/") / "cgroup.procs"


if __name__ == "__main__":
    sys.exit(main())
