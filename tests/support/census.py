"""Run real servers on a host with two addresses of each family, and see from which address they reply.

tests/support/setups/*.toml lists the set-ups. Keys of a [[setup]]:
  name       of the row; several set-ups may be of one server
  remedy     its entry in agent/client/remedies.toml; none: the set-up is right as it is, or has no
             setting that fixes it; "general": each address in place of the wildcard
  packages   of Debian; the first one gives the version
  command    line of shell, in a folder with `files`; see tests/support/debian_trees.py
  files      name -> content; "{code Go}": the code that explain prints for Go
  bind       what stands for {bind} in `command` and `files`. With the remedy: its line, once for each address
  fixed      what stands for {bind} with the remedy instead, for each address; {fix}: the remedy's line
  each       true: with the remedy, one process for each address
  once       true: the server serves one client, and is started anew for each request
  port       that it listens on
  request    name of a request (tests/support/census_requests.py), or text
  families   that it serves [46]
  wrong      families in which it replies from the wrong address [none]
  audit      families in which audit expects wrong replies before the first packet, if not those in `wrong`; "none"
  elsewhere  true: it replies from another port, which is never a finding
  image      line of shell that writes the root of a Docker image as a tar archive. `command` is then what follows
             `docker run`, and {image} stands for the image; without `each`, for one container
  outside    true: the client is not a container, but another host
  users      that it wants in /etc/passwd
  seconds    it may take to start [60]
  quick      true: part of `make test`
  note       for the table
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import socket
import subprocess
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, Any, Self

from census_docker import CensusDocker
from census_requests import request_named
from debian_trees import Tree, command, tree
from healed import Healed
from machine import own_cgroup
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.client.explain import remedy_advice
from udpwatch.agent.client.remedies import Remedy, codes, remedies, remedy_of
from udpwatch.agent.commands.audit import examine
from udpwatch.agent.errors import CannotRun
from udpwatch.agent.model import Cause, Row, Sender, Verdict
from udpwatch.agent.servers.audit import ServerRisk, WrongReply
from udpwatch.agent.testing.lab import ContainerHost

GENERAL = "general"  # explain's advice for an unknown server: list the addresses
FOLDER = Path(__file__).with_name("setups")
ASKED = {  # the address of docker0 is the nearer one: each server replies from it
    4: (ContainerHost.ETH0, ContainerHost.DOCKER0),
    6: (ContainerHost.ETH0_6, ContainerHost.DOCKER0_6),
}
CLIENTS = {
    False: {4: ContainerHost.CONTAINER, 6: ContainerHost.CONTAINER_6},
    True: {4: ContainerHost.OUTSIDE, 6: ContainerHost.OUTSIDE_6},
}
REPLY_SECONDS = 0.3, 0.6, 1.2, 5.0  # of each attempt
SETTLE_SECONDS = 0.2


@dataclass(frozen=True)
class Setup:
    """A server with one configuration."""

    name: str
    packages: Sequence[str]
    command: str
    port: int
    request: str
    remedy: str = ""
    files: dict[str, str] = field(default_factory=dict)
    bind: str = ""
    fixed: str = "{fix}"
    each: bool = False
    once: bool = False
    families: str = "46"
    wrong: str = ""
    audit: str = ""
    elsewhere: bool = False
    image: str = ""
    outside: bool = False
    users: Sequence[str] = ()
    seconds: float = 60.0
    quick: bool = False
    note: str = ""

    @property
    def predicted(self) -> str:
        """The families in which audit expects wrong replies."""
        return self.audit.replace("none", "") if self.audit else self.wrong

    def client(self, family: int) -> str:
        """Return the client's address."""
        return CLIENTS[self.outside][family]

    @property
    def addresses(self) -> list[str]:
        """The addresses that it is asked at, the farther one first: some set PKTINFO only for later requests."""
        order = -1 if self.outside else 1
        return [address for family in self.families for address in ASKED[int(family)][::order]]

    def with_remedy(self) -> Setup:
        """Return it as remedies.toml says."""
        lines = list(dict.fromkeys(self._fix(address) for address in self.addresses))
        if self.each:
            return replace(self, command="\n".join(self.command.replace("{bind}", line) + " &" for line in lines))
        return replace(self, bind="\n".join(lines) if "{bind}" not in self.command else " ".join(lines))

    def with_remedy_for(self, address: str) -> Setup:
        """Return it as remedies.toml says, for one address."""
        return replace(self, bind=self._fix(address))

    def _fix(self, address: str) -> str:
        family = family_of(address)
        row = Row(Sender(self.name), self.port, address, address, "new", "kernel-chosen", family, 1, 0.0, 0.0)
        text = (
            self.fixed if self.remedy == GENERAL else self.fixed.replace("{fix}", remedy_advice(self.known, row).config)
        )
        host = f"[{address}]" if family == 6 else address
        return (
            text.replace("{address}", address)
            .replace("{host}", host)
            .replace("{6}", "6" if family == 6 else "")
            .replace("{family}", str(family))
        )

    @property
    def known(self) -> Remedy:
        """Its remedy."""
        return remedy_called(self.remedy)


def remedy_called(name: str) -> Remedy:
    """Return the remedy of this name."""
    (found,) = (each for each in remedies() if each.name == name)
    return found


def setups() -> list[Setup]:
    """Return all set-ups, those with Docker last: its rules stay on the host."""
    found = [
        Setup(**entry) for path in sorted(FOLDER.glob("*.toml")) for entry in tomllib.loads(path.read_text())["setup"]
    ]
    return sorted(found, key=lambda setup: bool(setup.image))


@dataclass
class Outcome:
    """What was seen of a set-up."""

    sources: dict[str, str] = field(default_factory=dict)  # address asked -> source of the reply, "": no reply
    ports: set[int] = field(default_factory=set)  # from which it replied
    findings: Counter[tuple[str, str]] = field(default_factory=Counter)  # of the sensor: (expected, actual)
    processes: set[str] = field(default_factory=set)  # in the findings
    causes: set[Cause] = field(default_factory=set)  # in the findings
    healed: int = 0  # replies that the sensor counted as healed
    refused: Counter[str] = field(default_factory=Counter)  # sends that were not healed, by reason (model.REFUSALS)
    audit: list[ServerRisk] = field(default_factory=list)  # of the server, before the first packet
    log: str = ""

    def wrong(self) -> str:
        """Return the families in which a reply came from another address."""
        return "".join(sorted({str(family_of(asked)) for asked, _ in self.mismatches()}))

    def mismatches(self) -> set[tuple[str, str]]:
        """Return the pairs of address asked and source that differ, as the client saw them."""
        return {(asked, source) for asked, source in self.sources.items() if source not in ("", asked)}

    def silent(self) -> list[str]:
        """Return the addresses that gave no reply."""
        return [asked for asked, source in self.sources.items() if not source]

    def predicted(self, setup: Setup) -> str:
        """Return the families in which audit expects wrong replies in the client's network."""
        wrong = {str(reply.family) for each in self.audit for reply in each.wrong if _reaches_client(reply, setup)}
        return "".join(family for family in setup.families if family in wrong)

    def remedies(self) -> set[str]:
        """Return the names of the remedies that explain finds for the senders of the findings; "": it knows none."""
        senders = [each.sender for each in self.audit]
        if self.processes:  # none: it replies from another port
            senders = [replace(each, process=name) for each in senders for name in self.processes]
        return {found.name if (found := remedy_of(each)) else "" for each in senders}


class Census:
    """The host, its client, and a sensor for the servers' cgroup. A context manager."""

    def __init__(self, cache: Path) -> None:
        """``cache``: folder for compiled programs."""
        os.environ.setdefault("UDPWATCH_CACHE", str(cache))
        # A port that has asked the other address within the sensor's window gets a right reply from there, too.
        self._client_ports = count(10_000)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            cgroup = stack.enter_context(own_cgroup("servers", "containers"))
            self._cgroup = cgroup / "servers"
            self._host = stack.enter_context(ContainerHost())
            # As on a bridge that Docker made: otherwise, it changes with each container, and clients know the old one.
            self._host.node.ip("link set docker0 address 02:42:ac:11:00:01")
            self._watch = Watch(watched=cgroup, heal=True)
            stack.callback(self._watch.close)
            self._healed = stack.enter_context(contextlib.closing(Healed(self._watch.sensor, self._host.node)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run_healed(self, setup: Setup) -> Outcome:
        """Run the unchanged server with healing on for all ports. Raises NotAvailable."""
        before = self._healed.refused()
        with self._healed.on():
            outcome = self.run(setup)
        outcome.refused = self._healed.refused() - before
        return outcome

    def run(self, setup: Setup, remedied: bool = False) -> Outcome:
        """Start the server, ask it at each address, and stop it. Raises NotAvailable."""
        made, outcome = tree(setup.packages), Outcome()
        before = self._watch.findings(setup.port)
        if setup.once:
            for address in setup.addresses:
                one = setup.with_remedy_for(address) if remedied else setup
                with self._running(one, made, outcome) as process:
                    self._ask_all(one, process, [address], outcome)
        else:
            one = setup.with_remedy() if remedied else setup
            with self._running(one, made, outcome) as process:
                self._ask_all(one, process, setup.addresses, outcome)
        for finding, number in self._watch.findings(setup.port).items():
            added = number - before.get(finding, 0)
            if added and finding.verdict == Verdict.HEALED:
                outcome.healed += added
            elif added:
                outcome.findings[finding.expected, finding.actual] += added
                outcome.processes.add(finding.process)
                outcome.causes.add(Cause(finding.cause))
        return outcome

    @contextlib.contextmanager
    def _running(self, setup: Setup, made: Tree, outcome: Outcome) -> Iterator[subprocess.Popen[bytes]]:
        files = {name: _text(content).replace("{bind}", setup.bind) for name, content in setup.files.items()}
        text = setup.command.replace("{bind}", setup.bind)
        with tempfile.TemporaryDirectory(prefix="udpwatch-test-") as name:
            place = Path(name)
            try:
                with (place / "log").open("wb") as log:
                    if setup.image:
                        text = text.replace("{image}", self._docker.image(made, setup.image, files))
                        running = self._docker.running(text.splitlines() if setup.each else [text], log)
                    else:
                        running = self._process(command(place, made, text, files, setup.users), log)
                    with running as process:
                        yield process
                wait_for(lambda: not self._bound(setup), f"the end of {setup.name}")
            finally:
                outcome.log += (place / "log").read_text(errors="replace")

    @contextlib.contextmanager
    def _process(self, line: Sequence[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        def begin() -> None:
            (self._cgroup / "cgroup.procs").write_text(str(os.getpid()))
            self._host.node.enter_in_child()

        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=begin)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @functools.cached_property
    def _docker(self) -> CensusDocker:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="udpwatch-test-")))
        return self._stack.enter_context(CensusDocker(folder, self._host.node, self._cgroup))

    def _ask_all(
        self, setup: Setup, process: subprocess.Popen[bytes], addresses: Sequence[str], outcome: Outcome
    ) -> None:
        with contextlib.suppress(AssertionError):
            wait_for(
                lambda: self._listens(setup) or process.poll() is not None, f"{setup.name} to listen", setup.seconds
            )
            if not outcome.audit:
                outcome.audit = self._audit(setup)
        self._healed.follow()
        for address in addresses:
            outcome.sources[address] = ""
            for seconds in REPLY_SECONDS:
                if process.poll() is not None:
                    break
                if found := self._ask(setup, address, seconds):
                    outcome.sources[address] = found[0]
                    outcome.ports.add(found[1])
                    break

    def _listens(self, setup: Setup) -> bool:
        """Return whether it listens and has opened no socket for a while: many open one after another."""
        found = self._bound(setup)
        if not found:
            return False
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            time.sleep(SETTLE_SECONDS / 10)
            if self._bound(setup) != found:
                return False
        return True

    def _bound(self, setup: Setup) -> list[str]:
        """Return the unconnected sockets on its port: their rows of /proc/net/udp, without the counts."""
        with self._host.node.entered():
            text = "".join(Path(f"/proc/thread-self/net/udp{six}").read_text() for six in ("", "6"))
        fields = [line.split() for line in text.splitlines()]
        return [each[1] + each[9] for each in fields if each[1].endswith(f":{setup.port:04X}") and each[3] == "07"]

    def _audit(self, setup: Setup) -> list[ServerRisk]:
        try:
            servers, _ = examine(None)
        except CannotRun:  # no process has a UDP socket
            return []
        return [each for each in servers if each.netns == self._host.node.inode and each.port == setup.port]

    def _ask(self, setup: Setup, address: str, seconds: float) -> tuple[str, int] | None:
        host = self._host.outside if setup.outside else self._host.container
        with host.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
            client.settimeout(seconds)
            client.bind(("", next(self._client_ports)))
            with contextlib.suppress(OSError):
                client.sendto(request_named(setup.request), (address, setup.port))
                source: tuple[Any, ...] = client.recvfrom(65535)[1]
                return str(source[0]), int(source[1])
        return None


def _reaches_client(reply: WrongReply, setup: Setup) -> bool:
    """Return whether the client asks this address, from this network."""
    if reply.peers is None or reply.address not in ASKED[reply.family]:
        return False
    client = ipaddress.ip_address(setup.client(reply.family))
    network = reply.peers.network
    return network != "default" and client in ipaddress.ip_network(network)


def _text(content: str) -> str:
    """Return a file's text: "{code Go}" is the code that explain prints for Go."""
    return next((code.text for code in codes() if content == f"{{code {code.language}}}"), content)


def family_of(address: str) -> int:
    """Return 4 or 6."""
    return 6 if ":" in address else 4
