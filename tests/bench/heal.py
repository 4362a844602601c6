"""`make bench`: what healing costs on this machine, beside the same sensor without it."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from bench import RETURN_1, compiled, counted, line, means, pingpong
from healing import OFF, ON, Healing
from scene import V4, V6, Family, bound, source_control

from udpwatch.agent.kernel import bpf, cgroup
from udpwatch.agent.kernel.bpf import ProgramType
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.kernel.programs import HEAL_HOOKS
from udpwatch.agent.testing.lab import Lab, Namespace

PORT, SINK_PORT = 5_300, 5_301
PENDING = (1, 1_000, 65_536)
ROUNDS = 11
LONG_NS = 3_600_000_000_000  # the window: nothing expires meanwhile


@contextlib.contextmanager
def detached(healing: Healing, root: int) -> Iterator[None]:
    """Detach what heals during the body."""
    for program, _ in HEAL_HOOKS:
        os.close(healing.loaded.links.pop(program.name))
    try:
        yield
    finally:
        for program, hook in HEAL_HOOKS:
            healing.loaded.links[program.name] = bpf.link_create(
                healing.loaded.programs[program.name], root, hook.attach
            )


def ask_without_answer(alone: Namespace, first: int, last: int) -> None:
    """Make requests of different peers pending at a server that does not answer."""
    with bound(alone, socket.AF_INET, "0.0.0.0", SINK_PORT), alone.socket() as client:
        client.bind(("0.0.0.0", 0))
        for number in range(first, last):
            source = f"127.1.{number >> 8 & 255}.{number & 255}"
            client.sendmsg([b"x"], [source_control(V4, source)], 0, ("127.0.0.1", SINK_PORT))


def request_reply() -> None:
    """Pairs a second with healing, divided by pairs of the same sensor without it, alternately."""
    print("questions and answers over loopback, each answer healed: rate with healing / rate without")
    with compiled() as binary, Lab() as lab, contextlib.closing(cgroup.find(None)) as root:
        alone = lab.namespace("alone")
        with Healing(alone, limits=Limits(window_ns=LONG_NS)) as healing:
            healing.set_mode(PORT, ON)
            before = 0
            for pending in PENDING:
                ask_without_answer(alone, before, pending)
                before = pending
                for how, count, what in (("two", 30_000, "two processes"), ("one", 100_000, "one thread")):
                    ratios, without, with_ = [], [], []
                    for _ in range(ROUNDS):
                        with detached(healing, root.fd):
                            without.append(pingpong(binary, alone, how, count, PORT))
                        with_.append(pingpong(binary, alone, how, count, PORT))
                        ratios.append(without[-1] / with_[-1])
                    figures = " / ".join(f"{statistics.median(each):.0f}" for each in (without, with_))
                    line(
                        f"{what}, {pending:,} pending peers", f"{statistics.median(ratios):.3f}", f"{figures} ns a pair"
                    )


def sends() -> None:
    """Measure the mean run time of what heals by the kernel's statistics, compared with an empty program."""
    print("ns a send, by kernel.bpf_stats_enabled, net of an empty program on the same hook")
    with contextlib.closing(cgroup.find(None)) as root, Lab() as lab, contextlib.ExitStack() as held:
        alone = lab.namespace("alone")
        healing = held.enter_context(Healing(alone))
        held.enter_context(counted())
        for family, (program, hook) in zip((V4, V6), HEAL_HOOKS, strict=True):
            empty = bpf.program_load(ProgramType.CGROUP_SOCK_ADDR, hook.attach, RETURN_1)
            held.callback(os.close, empty)
            held.callback(os.close, bpf.link_create(empty, root.fd, hook.attach))
            for mode, what in ((ON, "a healed answer"), (OFF, "an answer of a port that is not healed")):
                healing.set_mode(PORT, mode)
                figures = [measured(alone, family, [healing.loaded.programs[program.name], empty]) for _ in range(5)]
                line(f"{program.name}, {what}", f"{statistics.median(ours - base for ours, base in figures):.0f} ns")


def measured(alone: Namespace, family: Family, programs: list[int]) -> list[float]:
    """Return the mean run time of each program for answers alone: the client is connected."""
    with bound(alone, family.inet, family.wildcard, PORT) as server, alone.socket(family.inet) as client:
        client.connect(("127.0.0.1" if family is V4 else "::1", PORT))

        def answers() -> None:
            for _ in range(20_000):
                client.send(b"x")
                server.sendto(*server.recvfrom(10))
                client.recv(10)

        return means(programs, answers)


ALL = (sends, request_reply)
PARTS = {part.__name__: part for part in ALL}


def main() -> None:
    print(f"healing: kernel {os.uname().release}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory(prefix="udpwatch-bench-") as folder:
        os.environ["UDPWATCH_CACHE"] = folder
        for name in sys.argv[1:] or PARTS:
            PARTS[name]()


if __name__ == "__main__":
    main()
