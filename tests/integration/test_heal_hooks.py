"""Healing beside other programs on the same hooks: healed or left alone, never wrong."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from agents import Agent, run_cli
from healing import OFF, ON, Healing
from machine import own_cgroup
from restricted import held_exclusively, unlimited
from scene import PATIENCE_SECONDS, SECOND, V4, bound
from wire import Wire

from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import AttachType, Command, ProgramType
from udpwatch.agent.testing.lab import ContainerHost

#: Further addresses of the container: what is sent to the first goes to the second.
REWRITTEN, BACKEND = "172.17.0.4", "172.17.0.5"
USER_IP4, MSG_SRC_IP4 = 4, 40  # struct bpf_sock_addr
ALLOW_MULTI = 2  # BPF_F_ALLOW_MULTI
CHILD = "child"


def set_if(member: int, expected: str, wanted: str, changed: int) -> bytes:
    """Return a program for sendmsg4: if an address of the send is the expected one, it changes one of them."""
    one, other = (struct.unpack("=i", socket.inet_aton(each))[0] for each in (expected, wanted))
    return b"".join(
        struct.pack("=BBhi", *instruction)
        for instruction in (
            (0x61, bpf.registers(2, 1), member, 0),  # w2 = *(u32 *)(r1 + member)
            (0x56, 2, 2, one),  # if w2 != expected goto the end
            (0xB4, 3, 0, other),  # w3 = wanted
            (0x63, bpf.registers(1, 3), changed, 0),  # *(u32 *)(r1 + changed) = w3
            (0xB7, 0, 0, 1),
            (0x95, 0, 0, 0),
        )
    )


#: as the socket load balancer of Cilium: another destination
REWRITES_DESTINATION = set_if(USER_IP4, REWRITTEN, BACKEND, USER_IP4)
NAMES_SOURCE = set_if(USER_IP4, ContainerHost.CONTAINER, SECOND, MSG_SRC_IP4)


@contextlib.contextmanager
def attached(code: bytes, folder: Path, how: str) -> Iterator[None]:
    """Attach a program to a cgroup during the body, by a link or by the older command."""
    with unlimited(), ExitStack() as held:
        program = bpf.program_load(ProgramType.CGROUP_SOCK_ADDR, AttachType.CGROUP_UDP4_SENDMSG, code, "neighbour")
        held.callback(os.close, program)
        place = held.enter_context(closing(cgroup.find(str(folder))))
        if how == "link":
            held.callback(os.close, bpf.link_create(program, place.fd, AttachType.CGROUP_UDP4_SENDMSG))
        else:
            flags = {Command.PROG_ATTACH: ALLOW_MULTI, Command.PROG_DETACH: 0}
            attributes = {
                command: ctypes.create_string_buffer(
                    struct.pack("=IIII", place.fd, program, AttachType.CGROUP_UDP4_SENDMSG, flag), 128
                )
                for command, flag in flags.items()
            }
            bpf.bpf(Command.PROG_ATTACH, attributes[Command.PROG_ATTACH])
            held.callback(bpf.bpf, Command.PROG_DETACH, attributes[Command.PROG_DETACH])
        yield


def replies_from(
    host: ContainerHost, folder: Path, port: int, client_address: str = ContainerHost.CONTAINER
) -> list[tuple[str, str]]:
    """Ask a plain server in a cgroup; return source and destination of its replies on the wire."""

    def serve() -> None:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.settimeout(PATIENCE_SECONDS)
            server.bind(("0.0.0.0", port))
            os.write(ready, b"x")
            server.sendto(*server.recvfrom(100))

    listening, ready = os.pipe()
    server = host.node.spawn("server", serve)
    assert os.read(listening, 1)
    os.close(listening)
    os.close(ready)
    with Wire(host.container) as wire, bound(host.container, V4.inet, client_address, 0) as client:
        client.sendto(b"request", (host.ETH0, port))
        assert server.wait() == 0
        return [(each.source, each.destination) for each in wire.read() if each.source_port == port]


@pytest.fixture
def place(host: ContainerHost) -> Iterator[Path]:
    """A cgroup with another one in it, instead of the root; the container has further addresses."""
    host.container.ip(*(f"addr add {each}/16 dev eth0" for each in (REWRITTEN, BACKEND)))
    with own_cgroup(CHILD) as folder:
        yield folder
    host.container.ip(*(f"addr del {each}/16 dev eth0" for each in (REWRITTEN, BACKEND)))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("where", ["same", CHILD])
@pytest.mark.parametrize("how", ["link", "attach"])
def test_reply_beside_a_program_of_another_is_healed_or_left_alone(
    host: ContainerHost, place: Path, port: int, how: str, where: str, order: str
) -> None:
    folder, server = (place, place / CHILD) if where == "same" else (place / CHILD, place / CHILD)
    with ExitStack() as programs:

        def attach_others() -> None:
            for code in (REWRITES_DESTINATION, NAMES_SOURCE):
                programs.enter_context(attached(code, folder, how))

        if order == "before":
            attach_others()
        healing = programs.enter_context(Healing(host.node, watched=place))
        if order == "after":
            attach_others()
        seen = {}
        for mode in (OFF, ON):
            healing.set_mode(port, mode)
            seen[mode] = [replies_from(host, server, port, each) for each in (host.CONTAINER, REWRITTEN)]
            if mode == OFF:
                assert healing.healed(port) == 0
        named, rewritten = seen[ON]
        assert seen[OFF] == [[(SECOND, host.CONTAINER)], [(host.DOCKER0, BACKEND)]]
        assert named == [(SECOND, host.CONTAINER)]
        assert rewritten in ([(host.DOCKER0, BACKEND)], [(host.ETH0, BACKEND)])
        assert healing.healed(port) == 0  # neither is a reply to who asked, from where it asked


def test_reply_is_healed_where_a_program_of_another_leaves_it(host: ContainerHost, place: Path, port: int) -> None:
    other = set_if(USER_IP4, "10.96.0.10", "10.96.0.11", USER_IP4)
    with attached(other, place, "attach"), Healing(host.node, watched=place) as healing, attached(other, place, "link"):
        healing.set_mode(port, ON)
        assert replies_from(host, place / CHILD, port) == [(host.ETH0, host.CONTAINER)]
        assert healing.healed(port) == 1


def test_agent_runs_without_healing_a_family_whose_hook_another_program_holds(folder: Path) -> None:
    with held_exclusively() as path, Agent(folder, f"--cgroup={path}", "--hooks=cgroup", "--heal=all") as agent:
        reason = rf"IPv4: cannot attach heal4 to {re.escape(str(path))}: EPERM: another program holds this hook"
        assert any(re.search(f"cannot heal: {reason}", line) for line in agent.log), agent.log
        status = run_cli("heal", "status", f"--connect={agent.socket}")
        assert status.returncode == 0
        assert "cannot attach heal4" in status.stdout
        probes = {probe["name"]: probe["attached"] for probe in agent.snapshot()["probes"]}
        assert (probes["egress"], probes["heal4"], probes["heal6"]) == (True, False, True)
