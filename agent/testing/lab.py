"""Network namespaces for the demo and the tests, with real links, addresses and conntrack.

A namespace has no name; this process holds it by a descriptor. The kernel removes the namespace and its links when this
process ends, even by SIGKILL, so nothing is left behind. Child processes are killed with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.kernel import netns

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends. Call it first in a child process."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Namespace:
    """One network namespace: a host of the lab."""

    def __init__(self, name: str) -> None:
        """Create the namespace and enable its loopback. Raises CannotRun without permission."""
        self.name = name
        try:
            self._fd = netns.create()
        except OSError as error:
            raise CannotRun(f"cannot create a network namespace: {error.strerror}; run this as root") from None
        self._children: list[Process] = []
        self.ip("link set lo up")

    @property
    def path(self) -> str:
        """The path of the namespace, for ip(8)."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def inode(self) -> int:
        """The inode number, as in lsns(8) and in an event's `netns`."""
        return os.fstat(self._fd).st_ino

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread into the namespace for a while; sockets created there stay there."""
        with netns.entered(self._fd):
            yield

    def socket(
        self, family: socket.AddressFamily = socket.AF_INET, kind: socket.SocketKind = socket.SOCK_DGRAM
    ) -> socket.socket:
        """Create a socket in the namespace."""
        with self.entered():
            return socket.socket(family, kind)

    def run(self, command: Sequence[str], stdin: str | None = None) -> str:
        """Run a command in the namespace and return its output. Raises UdpwatchError with its error message."""
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, text=True, check=False, preexec_fn=self.enter_in_child
            )
        except OSError as error:
            raise CannotRun(f"cannot run {command[0]}: {error.strerror}; install iproute2 and nftables") from None
        if done.returncode:
            reason = (done.stderr or done.stdout).strip()
            raise UdpwatchError(f"cannot run {' '.join(command)} in namespace {self.name}: {reason}")
        return done.stdout

    def popen(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command in the namespace. It is killed when this process ends. The caller waits for it."""
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=self.enter_in_child)

    def ip(self, *lines: str) -> None:
        """Run commands of ip(8) in the namespace."""
        self.run(["ip", "-batch", "-"], "\n".join(lines) + "\n")

    def add_addresses(self, device: str, *addresses: str) -> None:
        """Add addresses to a device; IPv4 networks are /24, IPv6 networks /64."""
        self.ip(*(f"addr add {each}{'/64 nodad' if ':' in each else '/24'} dev {device}" for each in addresses))

    def nft(self, rules: str) -> None:
        """Load a ruleset of nft(8) in the namespace."""
        self.run(["nft", "-f", "-"], rules)

    def sysctl(self, name: str, value: str) -> None:
        """Set a net.* sysctl of the namespace, e.g. ("net/ipv4/ip_forward", "1")."""
        with self.entered():
            Path("/proc/sys", name).write_text(value)

    def spawn(self, name: str, function: Callable[[], None]) -> Process:
        """Run a function in the namespace, in a new process with the name ``name``."""
        child = Process(name, function, self._fd)
        self._children.append(child)
        return child

    def close(self) -> None:
        """Kill its processes and close it."""
        for child in self._children:
            child.stop()
        self._children.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def enter_in_child(self) -> None:
        """Move a child into the namespace, to be killed with its parent. Use it as preexec_fn."""
        netns.setns(self._fd)
        die_with_parent()


class Process:
    """A function in a forked process with a name of its own."""

    def __init__(self, name: str, function: Callable[[], None], namespace: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                die_with_parent()
                if os.getppid() == parent:  # otherwise the parent ended before die_with_parent() took effect
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    Path("/proc/self/comm").write_text(name)
                    netns.setns(namespace)
                    function()
                    status = 0
            finally:
                os._exit(status)

    def wait(self) -> int:
        """Wait for its end; return its exit status, negative for a signal."""
        if self.pid:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            return os.waitstatus_to_exitcode(status)
        return 0

    def stop(self) -> None:
        """Kill the process and wait for its end."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                self.wait()


class Lab:
    """A set of namespaces and the links between them. The context manager removes them at its end."""

    def __init__(self) -> None:
        self._namespaces: list[Namespace] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in reversed(self._namespaces):
            namespace.close()
        self._namespaces.clear()

    def namespace(self, name: str) -> Namespace:
        """Add a namespace."""
        namespace = Namespace(name)
        self._namespaces.append(namespace)
        return namespace

    @staticmethod
    def link(one: Namespace, device: str, other: Namespace, other_device: str) -> None:
        """Connect two namespaces by a pair of veth devices, both up."""
        one.ip(f"link add {device} type veth peer name {other_device} netns {other.path}", f"link set {device} up")
        other.ip(f"link set {other_device} up")

    def pair(
        self, name: str, addresses: Sequence[str], other_name: str, other_addresses: Sequence[str]
    ) -> tuple[Namespace, Namespace]:
        """Add two namespaces and connect their eth0; the networks are /24 and /64."""
        one, other = self.namespace(name), self.namespace(other_name)
        self.link(one, "eth0", other, "eth0")
        one.add_addresses("eth0", *addresses)
        other.add_addresses("eth0", *other_addresses)
        return one, other


class ContainerHost(Lab):
    """The hosts of moby/moby#15127.

    ``outside`` 172.16.13.1 -- eth0 172.16.13.13 ``node`` docker0 172.17.0.1 -- 172.17.0.3 ``container``; the node
    forwards and masquerades as with Docker. For IPv6: fd00:13::1, fd00:13::13 -- fd00:17::1, fd00:17::3.
    """

    ETH0, DOCKER0, CONTAINER, OUTSIDE = "172.16.13.13", "172.17.0.1", "172.17.0.3", "172.16.13.1"
    ETH0_6, DOCKER0_6, CONTAINER_6, OUTSIDE_6 = "fd00:13::13", "fd00:17::1", "fd00:17::3", "fd00:13::1"

    def __init__(self) -> None:
        super().__init__()
        self.node = self.namespace("node")
        self.container = self.namespace("container")
        self.outside = self.namespace("outside")
        self.node.ip("link add docker0 type bridge forward_delay 0", "link set docker0 up")
        self.link(self.node, "veth0", self.container, "eth0")
        self.link(self.node, "eth0", self.outside, "eth0")
        self.node.ip(
            "link set veth0 master docker0",
            f"addr add {self.DOCKER0}/16 dev docker0",
            f"addr add {self.DOCKER0_6}/64 dev docker0 nodad",
            f"addr add {self.ETH0}/24 dev eth0",
            f"addr add {self.ETH0_6}/64 dev eth0 nodad",
        )
        self.container.ip(
            f"addr add {self.CONTAINER}/16 dev eth0",
            f"addr add {self.CONTAINER_6}/64 dev eth0 nodad",
            f"route add default via {self.DOCKER0}",
            f"route add ::/0 via {self.DOCKER0_6}",
        )
        self.outside.ip(
            f"addr add {self.OUTSIDE}/24 dev eth0",
            f"addr add {self.OUTSIDE_6}/64 dev eth0 nodad",
            f"route add default via {self.ETH0}",
            f"route add ::/0 via {self.ETH0_6}",
        )
        self.node.sysctl("net/ipv4/ip_forward", "1")
        self.node.sysctl("net/ipv6/conf/all/forwarding", "1")
        self.node.nft(
            "table inet nat { chain postrouting { type nat hook postrouting priority srcnat; "
            'ip saddr 172.17.0.0/16 oifname != "docker0" masquerade; '
            'ip6 saddr fd00:17::/64 oifname != "docker0" masquerade; }; }'
        )
