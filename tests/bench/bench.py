"""`make bench`: what udpwatch costs on this machine, beside the figures to reach (design, section 9).

Everything is measured against what it is compared with in the same run, alternately, medians of several. Virtual
machines are noisy: read the figures side by side, not as constants.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from agents import Agent, before_all
from load import RIGHT_PORT, SINK_PORT, TRACKING, answer_wrongly, compile_load, make_place
from router import Router
from scene import V4, V6, bound
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.kernel import bpf, cgroup, loader
from udpwatch.agent.kernel.bpf import AttachType, ProgramType
from udpwatch.agent.kernel.ctnetlink import Listener, Table
from udpwatch.agent.kernel.features import VMLINUX_BTF
from udpwatch.agent.kernel.probes import How, Target
from udpwatch.agent.kernel.programs import FUNCTIONS, HOOKS
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace

ROUNDS = 9
REPEAT = 300_000
TREE = Path(__file__).resolve().parents[2]
SERVERS, SERVER_NAMESPACES = 500, 10
RETURN_0 = bytes.fromhex("b7000000000000009500000000000000")
RETURN_1 = bytes.fromhex("b7000000010000009500000000000000")


def line(what: str, figure: str, reach: str = "") -> None:
    print(f"  {what:<52} {figure:>12}  {reach}", flush=True)


def packet(source: str, destination: str, source_port: int, destination_port: int, protocol: int = 17) -> bytes:
    """Return an Ethernet frame with a datagram of 64 bytes."""
    one, other = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    udp = struct.pack("!HHHH", source_port, destination_port, 72, 0) + bytes(64)
    if one.version == 6:
        header = struct.pack("!IHBB16s16s", 6 << 28, 72, protocol, 64, one.packed, other.packed)
        return bytes(12) + b"\x86\xdd" + header + udp
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 100, 1, 0, 64, protocol, 0, one.packed, other.packed)
    return bytes(12) + b"\x08\x00" + header + udp


def let_go(held: loader.Loaded) -> None:
    for group in (held.links, held.programs, held.maps):
        for descriptor in group.values():
            os.close(descriptor)


@contextlib.contextmanager
def loaded(watched: cgroup.Cgroup) -> Iterator[loader.Loaded]:
    """Load and attach the programs during the body."""
    held = loader.load(watched, loader.Limits())
    try:
        yield held
    finally:
        let_go(held)


@contextlib.contextmanager
def detached(held: loader.Loaded, root: int) -> Iterator[None]:
    """Detach the programs during the body."""
    for link in held.links.values():
        os.close(link)
    held.links.clear()
    try:
        yield
    finally:
        for program, hook in HOOKS:
            held.links[program.name] = bpf.link_create(held.programs[program.name], root, hook.attach)


@contextlib.contextmanager
def without_server_counts() -> Iterator[None]:
    """Have the loader compile programs that do not count the requests and replies of servers, during the body."""
    with tempfile.TemporaryDirectory(prefix="udpwatch-bench-") as folder:
        for room in ("agent", "bpf"):
            shutil.copytree(TREE / room, Path(folder, "udpwatch", room))
        source = Path(folder, "udpwatch", "bpf", "sockets.c")
        counting = re.compile(r"(static __always_inline void count_(?:requests|replies)\([^)]*\) \{\n)")
        changed, number = counting.subn(r"\1    return;\n", source.read_text())
        assert number == 2
        source.write_text(changed)
        before = os.environ.copy()
        os.environ |= before_all(Path(folder))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def programs() -> None:
    """Measure nanoseconds for each packet, minus those of an empty program (BPF_PROG_TEST_RUN)."""
    print("programs: ns a packet, net of an empty program (median of alternating runs)")
    with contextlib.closing(cgroup.find(None)) as root:
        folder = Path(root.path, f"udpwatch-bench-{os.getpid()}")
    folder.mkdir()
    empty = bpf.program_load(ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS, RETURN_1)
    try:
        with contextlib.closing(cgroup.find(str(folder))) as watched:
            held = loader.load(watched, loader.Limits(events_per_second=1))
            with without_server_counts():
                other = loader.load(watched, loader.Limits(events_per_second=1))
            ingress, egress = held.programs["ingress"], held.programs["egress"]
            # In a test run the socket is a dummy whose port is 0: so is the server's here.
            cases = [
                ("ingress, known conversation, IPv4", ingress, packet("10.0.0.9", "10.0.0.1", 4444, 0), "<= 30"),
                ("egress, known conversation, IPv4", egress, packet("10.0.0.1", "10.0.0.9", 0, 4444), "<= 30"),
                ("ingress, known conversation, IPv6", ingress, packet("fd00::9", "fd00::1", 4444, 0), "<= 30"),
                ("egress, known conversation, IPv6", egress, packet("fd00::1", "fd00::9", 0, 4444), "<= 30"),
                ("ingress, not UDP", ingress, packet("10.0.0.9", "10.0.0.1", 4444, 0, 6), "<= 1"),
                ("egress, not UDP", egress, packet("10.0.0.1", "10.0.0.9", 0, 4444, 6), "<= 1"),
                ("egress, peer that never asked", egress, packet("10.0.0.1", "10.0.0.8", 0, 4444), ""),
                ("egress, wrong reply (counted, event held back)", egress, packet("10.0.0.2", "10.0.0.9", 0, 4444), ""),
            ]
            question = packet("10.0.0.9", "10.0.0.1", 4444, 0)
            uncounted = {ingress: other.programs["ingress"], egress: other.programs["egress"]}
            for what, program, frame, reach in cases:
                net, more = [], []
                for _ in range(ROUNDS):
                    if "wrong" in what:
                        bpf.program_test_run(ingress, question, 1)  # else nothing is pending
                    base = bpf.program_test_run(empty, frame, REPEAT)[1]
                    net.append(bpf.program_test_run(program, frame, REPEAT)[1] - base)
                    more.append(net[-1] + base - bpf.program_test_run(uncounted[program], frame, REPEAT)[1])
                line(what, f"{statistics.median(net):.0f} ns", reach)
                if "known" in what:
                    line("  of which counting for its server", f"{statistics.median(more):.1f} ns", "<= 5")
            fresh = []
            for start in range(0, 20_000, 4_000):
                frames = [
                    (packet("10.1.0.9", "10.0.0.1", port, 0), packet("10.0.0.1", "10.1.0.9", 0, port))
                    for port in range(start, start + 4_000)
                ]
                begin = time.perf_counter_ns()
                for asked, answered in frames:
                    bpf.program_test_run(empty, asked, 1)
                    bpf.program_test_run(empty, answered, 1)
                between = time.perf_counter_ns()
                for asked, answered in frames:
                    bpf.program_test_run(ingress, asked, 1)
                    bpf.program_test_run(egress, answered, 1)
                fresh.append(((time.perf_counter_ns() - between) - (between - begin)) / 4_000)
            line("first packet and its right reply, together", f"{statistics.median(fresh):.0f} ns", "<= 600, cold")
            let_go(held)
            let_go(other)
    finally:
        os.close(empty)
        folder.rmdir()


def sendmsg() -> None:
    """Measure the sendmsg hook's mean run time by the kernel's statistics, compared with an empty program; it has no
    test run.
    """
    print("sendmsg4: ns a send, by kernel.bpf_stats_enabled, net of an empty program on the same hook")
    with contextlib.closing(cgroup.find(None)) as root, loaded(root) as sensor, Lab() as lab, counted():
        alone = lab.namespace("alone")
        empty = bpf.program_load(ProgramType.CGROUP_SOCK_ADDR, AttachType.CGROUP_UDP4_SENDMSG, RETURN_1)
        link = bpf.link_create(empty, root.fd, AttachType.CGROUP_UDP4_SENDMSG)
        try:
            with alone.socket() as server, alone.socket() as client:
                server.bind(("127.0.0.1", 0))
                client.bind(("127.0.0.1", 0))

                def replies() -> None:
                    for _ in range(20_000):
                        client.sendto(b"x", server.getsockname())
                        server.sendto(*server.recvfrom(10))
                        client.recv(10)

                def unasked() -> None:
                    for _ in range(20_000):
                        client.sendto(b"x", ("127.0.0.1", 9))

                for what, traffic in (
                    ("sends that are answers", replies),
                    ("sends to a peer that never asked", unasked),
                ):
                    figures = [means([sensor.programs["sendmsg4"], empty], traffic) for _ in range(5)]
                    line(what, f"{statistics.median(ours - base for ours, base in figures):.0f} ns")
        finally:
            os.close(link)
            os.close(empty)


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Have the kernel count the programs' run times during the body."""
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text()
    switch.write_text("1")
    try:
        yield
    finally:
        switch.write_text(before)


def function_probes() -> None:
    """Measure each function probe's mean run time beside an empty probe's on the same function."""
    print("function probes: ns a run, by kernel.bpf_stats_enabled; an empty probe on the same function; their ratio")
    with contextlib.closing(cgroup.find(None)) as root, contextlib.ExitStack() as stack:
        with Table() as table:
            table.entries()  # the kernel loads conntrack
        held = stack.enter_context(loaded(root))
        if held.features.probes_reason:
            line("not allowed here", held.features.probes_reason, "see `make bench-kernel`")
            return
        empty = {}
        for _, function in FUNCTIONS:
            how = How(held.features.functions[function.name])
            target = stack.enter_context(Target(function, how, VMLINUX_BTF))
            empty[function.name] = target.load(RETURN_0, "empty")[0]
            stack.callback(os.close, empty[function.name])
            stack.callback(os.close, target.attach(empty[function.name]))
        router = stack.enter_context(Router())
        stack.enter_context(counted())
        sides = [router.node.socket(family) for family in (socket.AF_INET, socket.AF_INET6)]

        def sends() -> None:
            for side, to in zip(sides, ("127.0.0.1", "::1"), strict=True):
                for _ in range(5_000):
                    side.sendto(b"x", (to, 9))

        def flows() -> None:
            for number in range(2_000):
                router.ask("10.1.0.9", 10_000 + number, "10.2.0.5", 53)
                router.answer("10.2.0.5", 53, "10.1.0.9", 10_000 + number)
            router.node.run(["conntrack", "-F"])

        for name, traffic in (
            ("udp_sendmsg", sends),
            ("udpv6_sendmsg", sends),
            ("__nf_conntrack_confirm", flows),
            ("nf_ct_delete", flows),
        ):
            figures = [means([held.programs[name], empty[name]], traffic) for _ in range(5)]
            ours, base = (statistics.median(column) for column in zip(*figures, strict=True))
            how = held.features.functions[name]
            line(f"{name} ({how})", f"{ours:.0f} / {base:.0f} ns, {ours / base:.1f} times")
        for side in sides:
            side.close()


def means(programs: list[int], traffic: Callable[[], None]) -> list[float]:
    """Return nanoseconds for each run of each program during the traffic."""
    before = [bpf.program_info(each) for each in programs]
    traffic()
    after = [bpf.program_info(each) for each in programs]
    return [
        (b.run_time_ns - a.run_time_ns) / max(1, b.run_count - a.run_count) for a, b in zip(before, after, strict=True)
    ]


def conntrack_events() -> None:
    """Measure what `--forwarded` costs without probes: the kernel's part for each new flow, and the agent's."""
    print("conntrack's events over netlink")
    count = 3_000
    with Router() as router:

        def flows(start: int) -> float:
            begin = time.perf_counter()
            for number in range(start, start + count):
                router.ask("10.1.0.9", 1_024 + number, "10.2.0.5", 53)
            return (time.perf_counter() - begin) / count * 1e6

        without, with_, read = [], [], []
        for turn in range(5):
            without.append(flows(2 * turn * count))
            with router.node.entered():
                listener = Listener(32 << 20)
            with_.append(flows((2 * turn + 1) * count))
            begin = time.perf_counter()
            entries = sum(1 for _ in listener.read())
            read.append((time.perf_counter() - begin) / entries * 1e6)
            listener.close()
        extra = statistics.median(b - a for a, b in zip(without, with_, strict=True))
        line("kernel, a new flow more", f"{extra:.1f} us", f"of {statistics.median(without):.1f} us for all of it")
        line("agent, decoding an event", f"{statistics.median(read):.1f} us")


@contextlib.contextmanager
def compiled() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "pingpong")
        source = Path(__file__).with_name("pingpong.c")
        subprocess.run(["gcc", "-O2", "-o", binary, source], check=True)
        yield binary


def pingpong(binary: Path, namespace: Namespace, how: str, count: int, port: int = 0) -> float:
    return float(namespace.run([str(binary), how, str(count), str(port)]))


@contextlib.contextmanager
def empty_programs(root: int) -> Iterator[None]:
    """Attach programs that only return: their cost is the kernel's own for the hooks."""
    held = []
    for _, hook in HOOKS:
        held.append(bpf.program_load(hook.type, hook.attach, RETURN_1))
        held.append(bpf.link_create(held[-1], root, hook.attach))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def request_reply() -> None:
    """Pairs a second with the programs attached, divided by pairs without, alternately.

    "One thread" does nothing but four system calls a pair: no work, no scheduling, the worst case for any hook.
    """
    print("questions and answers over loopback, a plain C server: rate with udpwatch / rate without")
    with compiled() as binary, Lab() as lab, contextlib.closing(cgroup.find(None)) as root:
        alone = lab.namespace("alone")
        with loaded(root) as sensor:
            for how, count, what, reach in (
                ("two", 60_000, "two processes", ">= 0.97"),
                ("one", 200_000, "one thread", ""),
            ):
                without, idle, with_ = [], [], []
                for _ in range(11):
                    with detached(sensor, root.fd):
                        without.append(pingpong(binary, alone, how, count))
                        with empty_programs(root.fd):
                            idle.append(pingpong(binary, alone, how, count))
                    with_.append(pingpong(binary, alone, how, count))
                for name, other, goal in (("udpwatch", with_, reach), ("empty programs on the same hooks", idle, "")):
                    ratio = statistics.median(a / b for a, b in zip(without, other, strict=True))
                    line(f"{what}, {name}", f"{ratio:.3f}", goal)
                nanoseconds = " / ".join(f"{statistics.median(each):.0f}" for each in (without, idle, with_))
                line("  ns a pair: without / empty / udpwatch", nanoseconds)


def start() -> None:
    """Measure the start of the agent, without a cache and with it."""
    print("the agent")
    with tempfile.TemporaryDirectory(prefix="udpwatch-bench-") as folder:
        kept = Path(folder, "cache")
        ready: dict[str, list[float]] = {"off": [], str(kept): []}
        rss = []
        with Agent(Path(folder), f"--cache={kept}"):
            pass
        for _ in range(5):
            for cache, seconds in ready.items():
                begin = time.perf_counter()
                with Agent(Path(folder), f"--cache={cache}") as running:
                    seconds.append(time.perf_counter() - begin)
                    running.get("/metrics")
                    rss.append(running.resident_kib() / 1024)
    for what, seconds in zip(("first start", "any later one"), ready.values(), strict=True):
        line(f"{what}, to ready (first possible finding)", f"{statistics.median(seconds):.2f} s", "<= 1.5 s")
    line("resident memory after a scrape", f"{statistics.median(rss):.1f} MB", "<= 45 MB")


def servers() -> None:
    """Measure what many servers cost the agent, beside none."""
    print(f"{SERVERS} servers in {SERVER_NAMESPACES} namespaces, each of which has replied once")
    with tempfile.TemporaryDirectory(prefix="udpwatch-bench-") as folder, contextlib.ExitStack() as held:
        running = held.enter_context(Agent(Path(folder)))
        nothing = cpu_share(running)
        lab = held.enter_context(Lab())
        for each in range(SERVER_NAMESPACES):
            namespace = lab.namespace(f"n{each}")
            for port in range(5_000 + each, 5_000 + SERVERS, SERVER_NAMESPACES):
                server = held.enter_context(namespace.socket())
                server.bind(("0.0.0.0", port))
                with namespace.socket() as client:
                    client.sendto(b"x", ("127.0.0.1", port))
                    server.sendto(*server.recvfrom(10))
        ours = os.getpid()
        listed = wait_for(
            lambda: (
                len(found := [each for each in running.snapshot()["servers"] if each["requests"]]) >= SERVERS and found
            ),
            "the servers",
        )
        assert {each["sender"]["pid"] for each in listed} == {ours}
        with_them = cpu_share(running)
        scrapes, size = [], 0
        for _ in range(21):
            begin = time.perf_counter()
            _, page = running.get("/metrics")
            scrapes.append(time.perf_counter() - begin)
            size = len(page)
        line("a scrape", f"{statistics.median(scrapes) * 1e3:.1f} ms", f"{size / 1e3:.0f} kB")
        line("CPU time of the agent", f"{with_them:.2%}", f"of one CPU; with none {nothing:.2%}")
        line("resident memory after the scrapes", f"{running.resident_kib() / 1024:.1f} MB", "<= 45 MB")


def cpu_share(running: Agent, seconds: float = 10.0) -> float:
    """Return the share of one CPU that the agent uses."""

    def used() -> float:
        fields = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


def flood() -> None:
    """Send wrong replies as fast as two processes can."""
    each = 300_000
    with tempfile.TemporaryDirectory(prefix="udpwatch-bench-") as folder, ContainerHost() as host:
        with Agent(Path(folder)) as running, host.container.socket() as client:

            def pour(server: socket.socket) -> None:
                data, peer = server.recvfrom(10)
                for _ in range(each):
                    server.sendto(data, peer)

            children, sockets = [], [host.node.socket() for _ in range(2)]
            for server in sockets:
                server.bind(("0.0.0.0", 0))
                children.append(host.node.spawn("flood", lambda server=server: pour(server)))
            begin = time.perf_counter()
            for server in sockets:
                client.sendto(b"x", (host.ETH0, server.getsockname()[1]))
            for child in children:
                child.wait()
            seconds = time.perf_counter() - begin
            ports = [server.getsockname()[1] for server in sockets]
            counted = sum(running.counted(port, each) for port in ports)
            for server in sockets:
                server.close()
            line("wrong replies a second, from two Python senders", f"{2 * each / seconds:.0f}")
            line("  sent and counted", f"{2 * each} {counted}", "the same")
            line("  resident memory afterwards", f"{running.resident_kib() / 1024:.1f} MB", "<= 45 MB")


def fill_info(descriptor: int, info: ctypes.Array[ctypes.c_char]) -> None:
    """Let the kernel fill in its struct about a program or a map."""
    attribute = ctypes.create_string_buffer(struct.pack("=IIQ", descriptor, len(info), ctypes.addressof(info)))
    bpf.bpf(bpf.Command.OBJ_GET_INFO_BY_FD, attribute)


def map_ids(program: int) -> list[int]:
    """Return the maps that a program uses (struct bpf_prog_info, nr_map_ids and map_ids)."""
    ids, info = ctypes.create_string_buffer(4 * 64), ctypes.create_string_buffer(224)
    struct.pack_into("=IIQ", info, 48, 0, 64, ctypes.addressof(ids))
    fill_info(program, info)
    return list(struct.unpack_from(f"={struct.unpack_from('=I', info, 52)[0]}I", ids))


def map_name(descriptor: int) -> str:
    """Return the name that the kernel has for a map (struct bpf_map_info)."""
    info = ctypes.create_string_buffer(40)
    fill_info(descriptor, info)
    return info.raw[24:40].rstrip(b"\0").decode()


def kernel_memory() -> None:
    """Return the memory of each map of the agent's programs, as the kernel accounts for it (memlock in fdinfo)."""
    print("memory of the maps")
    with contextlib.closing(cgroup.find(None)) as root, loaded(root) as held:
        total = 0
        for number in sorted({number for program in held.programs.values() for number in map_ids(program)}):
            descriptor = bpf.bpf(
                bpf.Command.MAP_GET_FD_BY_ID, ctypes.create_string_buffer(struct.pack("=III", number, 0, 0))
            )
            lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
            memory = int(dict(each.split(":\t", 1) for each in lines)["memlock"])
            total += memory
            line(map_name(descriptor), f"{memory / 1e6:.1f} MB")
        line("all of them", f"{total / 1e6:.1f} MB", "with the agent <= 45 MB")


LOADS = (
    *(("right server", True, rate) for rate in (5_000, 20_000, 50_000, 0)),
    *(("one-way sink", False, rate) for rate in (20_000, 200_000, 0)),
)


def busy() -> None:
    """Measure the share of one server's wrong replies that is found beside another server's load: rows of load, columns
    of tracking.
    """
    print("wrong replies found / sent, beside fresh conversations of 40 addresses (0: as many as go)")
    seconds = 4
    with tempfile.TemporaryDirectory(prefix="udpwatch-bench-") as folder:
        binary = compile_load(Path(folder))
        os.environ["UDPWATCH_CACHE"] = folder
        for family in (V4, V6):
            for tracking in TRACKING:
                for what, answered, rate in LOADS:
                    for wrong in (5, 1000):
                        with Lab() as lab, contextlib.closing(Watch()) as watch:
                            place = make_place(lab, binary, tracking)
                            before = watch.sensor.counters()
                            with contextlib.ExitStack() as held:
                                at = RIGHT_PORT if answered else SINK_PORT
                                if answered:
                                    held.enter_context(place.right_server(family))
                                else:
                                    held.enter_context(bound(place.server, family.inet, family.wildcard, SINK_PORT))
                                held.enter_context(place.flood(family, at, rate, seconds))
                                sent = answer_wrongly(place, family, 7_003, wrong, seconds)
                            found, false = watch.count(7_003), watch.count(at)
                            after = watch.sensor.counters()
                        made = (after.remembered - before.remembered) / seconds
                        line(
                            f"{family.name} {tracking}, {what} {made:.0f}/s, {wrong}/s",
                            f"{found} / {sent}",
                            f"false {false}, undecided {after.undecided}",
                        )


ALL = (programs, sendmsg, function_probes, conntrack_events, request_reply, start, servers, kernel_memory, flood, busy)
PARTS = {part.__name__: part for part in ALL}


def main() -> None:
    print(f"kernel {os.uname().release}, {os.cpu_count()} CPUs")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
