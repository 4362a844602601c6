"""Run real servers on a host with two addresses of each family, and see from which address they reply.

tests/support/setups/*.toml lists the set-ups. Keys of a [[setup]]:
  name       of the row; several set-ups may be of one server
  remedy     its entry in agent/client/remedies.toml; none: the set-up is right as it is, or has no
             setting that fixes it; "general": each address in place of the wildcard
  packages   of Debian; the first one gives the version
  command    line of shell, in a folder with `files`; see tests/support/debian_trees.py
  files      name -> content
  bind       what stands for {bind} in `command` and `files`. With the remedy: its line, once for each address
  fixed      what stands for {bind} with the remedy instead, for each address; {fix}: the remedy's line
  each       true: with the remedy, one process for each address
  once       true: the server serves one client, and is started anew for each request
  port       that it listens on
  request    name of a request (tests/support/census_requests.py), or text
  families   that it serves [46]
  wrong      families in which it replies from the wrong address [none]
  elsewhere  true: it replies from another port, which is never a finding
  users      that it wants in /etc/passwd
  seconds    it may take to start [20]
  quick      true: part of `make test`
  note       for the table
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from census_requests import request_named
from debian_trees import Tree, command, tree
from machine import own_cgroup
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.client.explain import remedy_advice
from udpwatch.agent.client.remedies import Remedy, remedies
from udpwatch.agent.commands.audit import examine
from udpwatch.agent.errors import CannotRun
from udpwatch.agent.model import Row, Sender
from udpwatch.agent.servers.audit import ServerRisk, WrongReply
from udpwatch.agent.testing.lab import ContainerHost

GENERAL = "general"  # explain's advice for an unknown server: list the addresses
FOLDER = Path(__file__).with_name("setups")
ASKED = {
    4: (ContainerHost.DOCKER0, ContainerHost.ETH0),  # the nearer address first: each server replies from it
    6: (ContainerHost.DOCKER0_6, ContainerHost.ETH0_6),
}
REPLY_SECONDS = 0.3, 0.6, 1.2  # of each attempt


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
    elsewhere: bool = False
    users: Sequence[str] = ()
    seconds: float = 20.0
    quick: bool = False
    note: str = ""

    @property
    def addresses(self) -> list[str]:
        """The addresses that it is asked at."""
        return [address for family in self.families for address in ASKED[int(family)]]

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
        (found,) = (each for each in remedies() if each.name == self.remedy)
        return found


def setups() -> list[Setup]:
    """Return all set-ups."""
    return [
        Setup(**entry) for path in sorted(FOLDER.glob("*.toml")) for entry in tomllib.loads(path.read_text())["setup"]
    ]


@dataclass
class Outcome:
    """What was seen of a set-up."""

    sources: dict[str, str] = field(default_factory=dict)  # address asked -> source of the reply, "": no reply
    ports: set[int] = field(default_factory=set)  # from which it replied
    findings: int = 0  # of the sensor
    audit: list[ServerRisk] = field(default_factory=list)  # before the first packet
    log: str = ""

    def wrong(self) -> str:
        """Return the families in which a reply came from another address."""
        wrong = {family_of(asked) for asked, source in self.sources.items() if source not in ("", asked)}
        return "".join(map(str, sorted(wrong)))

    def silent(self) -> list[str]:
        """Return the addresses that gave no reply."""
        return [asked for asked, source in self.sources.items() if not source]

    def predicted(self, families: str) -> str:
        """Return which of these families audit expects to get a wrong reply in the client's network."""
        wrong = {str(reply.family) for each in self.audit for reply in each.wrong if _reaches_client(reply)}
        return "".join(family for family in families if family in wrong)


class Census:
    """The host, its client, and a sensor for the servers' cgroup. A context manager."""

    def __init__(self, cache: Path) -> None:
        """``cache``: folder for compiled programs."""
        os.environ.setdefault("UDPWATCH_CACHE", str(cache))

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._cgroup = stack.enter_context(own_cgroup())
            self._host = stack.enter_context(ContainerHost())
            self._watch = Watch(watched=self._cgroup)
            stack.callback(self._watch.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, setup: Setup, remedied: bool = False) -> Outcome:
        """Start the server, ask it at each address, and stop it. Raises NotAvailable."""
        made, outcome = tree(setup.packages), Outcome()
        before = self._watch.count(setup.port)
        if setup.once:
            for address in setup.addresses:
                one = setup.with_remedy_for(address) if remedied else setup
                with self._running(one, made, outcome) as process:
                    self._ask_all(one, process, [address], outcome)
        else:
            one = setup.with_remedy() if remedied else setup
            with self._running(one, made, outcome) as process:
                self._ask_all(one, process, setup.addresses, outcome)
        outcome.findings = self._watch.count(setup.port) - before
        return outcome

    @contextlib.contextmanager
    def _running(self, setup: Setup, made: Tree, outcome: Outcome) -> Iterator[subprocess.Popen[bytes]]:
        files = {name: content.replace("{bind}", setup.bind) for name, content in setup.files.items()}
        text = setup.command.replace("{bind}", setup.bind)
        with tempfile.TemporaryDirectory(prefix="udpwatch-test-") as name:
            place = Path(name)
            line = command(place, made, text, files, setup.users)

            def begin() -> None:
                (self._cgroup / "cgroup.procs").write_text(str(os.getpid()))
                self._host.node.enter_in_child()

            with (place / "log").open("wb") as log:
                process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=begin)
            try:
                yield process
            finally:
                process.kill()
                process.wait()
                outcome.log += (place / "log").read_text(errors="replace")

    def _ask_all(
        self, setup: Setup, process: subprocess.Popen[bytes], addresses: Sequence[str], outcome: Outcome
    ) -> None:
        with contextlib.suppress(AssertionError):
            wait_for(
                lambda: self._listens(setup) or process.poll() is not None, f"{setup.name} to listen", setup.seconds
            )
            if not outcome.audit:
                outcome.audit = self._audit(setup)
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
        with self._host.node.entered():
            text = "".join(Path(f"/proc/thread-self/net/udp{six}").read_text() for six in ("", "6"))
        return f":{setup.port:04X} 0000" in text

    def _audit(self, setup: Setup) -> list[ServerRisk]:
        try:
            servers, _ = examine(None)
        except CannotRun:  # no process has a UDP socket
            return []
        return [each for each in servers if each.netns == self._host.node.inode and each.port == setup.port]

    def _ask(self, setup: Setup, address: str, seconds: float) -> tuple[str, int] | None:
        with self._host.container.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
            client.settimeout(seconds)
            with contextlib.suppress(OSError):
                client.sendto(request_named(setup.request), (address, setup.port))
                source: tuple[Any, ...] = client.recvfrom(65535)[1]
                return str(source[0]), int(source[1])
        return None


def _reaches_client(reply: WrongReply) -> bool:
    """Return whether the client asks this address, from this network."""
    if reply.peers is None or reply.address not in ASKED[reply.family]:
        return False
    client = ContainerHost.CONTAINER_6 if reply.family == 6 else ContainerHost.CONTAINER
    network = reply.peers.network
    return network != "default" and ipaddress.ip_address(client) in ipaddress.ip_network(network)


def family_of(address: str) -> int:
    """Return 4 or 6."""
    return 6 if ":" in address else 4
