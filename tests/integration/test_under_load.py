"""Findings under load: other servers' traffic, floods of other tenants, clients that ask many addresses."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from dns_server import Responder, needs
from load import ASKED, RIGHT_PORT, SINK_PORT, TRACKING, Place, answer_wrongly, compile_load, make_place
from machine import own_cgroup
from scene import PATIENCE_SECONDS, V4, V6, Family, ask, bound, source_control
from sensors import Watch, open_netlink_watch
from stub_resolvers import LOOKUP, resolve

from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Finding
from udpwatch.agent.sources import sockets
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import Lab, Namespace

FLOOD_SECONDS = 4


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_load(tmp_path_factory.mktemp("load"))


@pytest.fixture(params=TRACKING)
def place(request: pytest.FixtureRequest, load: Path) -> Iterator[Place]:
    with Lab() as lab:
        yield make_place(lab, load, request.param)


@pytest.fixture(scope="module")
def netlink_watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """A sensor for this file alone: in mode netlink each wrong reply during load is an element of its own."""
    with closing(open_netlink_watch(tmp_path_factory.mktemp("btf"))) as watch:
        yield watch


def of_place(watch: Watch, port: int) -> int:
    """Return the wrong replies from a local port of a Place: other tests use several consecutive ports."""
    asked = {address for pair in ASKED for address in pair}
    return sum(count for finding, count in watch.findings(port).items() if finding.expected in asked)


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("rate", [5, 500])
def test_wrong_replies_are_found_beside_a_right_server(
    packet_watch: Watch, place: Place, port: int, family: Family, rate: int
) -> None:
    """The right server has a resolver's load: 20,000 new conversations a second."""
    with place.right_server(family), place.flood(family, RIGHT_PORT, 20_000, FLOOD_SECONDS):
        sent = answer_wrongly(place, family, port, rate, FLOOD_SECONDS)
    assert of_place(packet_watch, port) == sent
    assert of_place(packet_watch, RIGHT_PORT) == 0


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_wrong_replies_are_found_beside_one_way_traffic(
    packet_watch: Watch, place: Place, port: int, family: Family
) -> None:
    """A sink that never replies, on another port of the same namespace, floods the table."""
    with bound(place.server, family.inet, family.wildcard, SINK_PORT):
        before = packet_watch.sensor.counters().evicted
        with place.flood(family, SINK_PORT, 100_000, FLOOD_SECONDS):
            sent = answer_wrongly(place, family, port, 300, FLOOD_SECONDS)
    assert packet_watch.sensor.counters().evicted > before  # the table was full
    assert of_place(packet_watch, port) == sent
    assert of_place(packet_watch, SINK_PORT) == 0


def test_old_request_survives_a_flood(place: Place, port: int) -> None:
    """Its request came before another tenant's flood, its wrong reply after it."""
    with (
        closing(Watch()) as watch,
        bound(place.server, socket.AF_INET, "0.0.0.0", SINK_PORT),
        bound(place.server, socket.AF_INET, "0.0.0.0", port) as server,
        ExitStack() as clients,
    ):
        requests = []
        for _ in range(50):
            client = clients.enter_context(place.client.socket())
            requests.append(ask(client, ASKED[0][1], port, server))
        with place.flood(V4, SINK_PORT, 0, 2):
            pass
        for request in requests:
            server.sendto(*request)
        assert watch.count(port) == 50


def test_flood_evicts_its_own_requests(place: Place, port: int) -> None:
    """What the flooded server sends to evicted clients is undecided: counted, never a finding."""
    with (
        closing(Watch(Limits(max_peers=1024))) as watch,
        bound(place.server, socket.AF_INET, "0.0.0.0", SINK_PORT) as sink,
        place.client.socket() as client,
    ):
        _, peer = ask(client, ASKED[0][1], SINK_PORT, sink)
        with place.flood(V4, SINK_PORT, 0, 1):
            pass
        before = watch.sensor.counters().undecided
        sink.sendto(b"late", peer)
        assert watch.count(SINK_PORT) == 0
        assert watch.sensor.counters().undecided > before


def test_evictions_in_one_set_hit_the_flood_first(port: int) -> None:
    """In one set of eight, with seven requests of another server and one of the flood, the flood's is evicted."""
    with Lab() as lab, own_cgroup() as folder, closing(Watch(Limits(max_peers=8), watched=folder)) as watch:
        alone = lab.namespace("alone")

        def converse() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))
            with ExitStack() as opened:
                sink = opened.enter_context(bound(alone, socket.AF_INET, "0.0.0.0", port + 10_000))
                server = opened.enter_context(bound(alone, socket.AF_INET, "0.0.0.0", port))

                def flood(count: int) -> None:
                    for _ in range(count):
                        ask(opened.enter_context(alone.socket()), "127.0.0.2", port + 10_000, sink)

                flood(200)
                requests = [ask(opened.enter_context(alone.socket()), "127.0.0.2", port, server) for _ in range(7)]
                flood(50)
                for request in requests:
                    server.sendto(*request)

        assert alone.spawn("converse", converse).wait() == 0
        assert watch.count(port) == 7


def test_reply_to_an_evicted_address_is_undecided(port: int) -> None:
    """Two conversations ask more addresses than there is room for: the right reply to an evicted request is counted."""
    with Lab() as lab, closing(Watch(Limits(max_peers=256))) as watch:
        alone = lab.namespace("alone")
        with (
            bound(alone, socket.AF_INET, "0.0.0.0", port) as server,
            alone.socket() as first,
            alone.socket() as second,
        ):
            for client in (first, second):
                for number in range(2, 42):
                    _, peer = ask(client, f"127.0.0.{number}", port, server)
                    if client is first:
                        asked = peer
            before = watch.sensor.counters()
            server.sendmsg([b"right"], [source_control(V4, "127.0.0.2")], 0, asked)
            after = watch.sensor.counters()
            assert watch.count(port) == 0
            assert after.evicted >= 80 - 64
            assert after.undecided - before.undecided == 1
            # The newest request is still there, and an address that was never asked is a wrong source.
            server.sendmsg([b"wrong"], [source_control(V4, "127.0.0.99")], 0, peer)


# ---- many addresses ----


@dataclass
class Pending:
    """The model: requests with their replies, by the rules of docs/findings.md."""

    asked: list[str]
    wrong: dict[str, int]

    def ask(self, address: str) -> None:
        self.asked.append(address)

    def answer(self, address: str) -> None:
        self.asked.remove(address)

    def answer_wrongly(self) -> None:
        if self.asked:
            newest = self.asked[-1]
            self.wrong[newest] = self.wrong.get(newest, 0) + 1


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("slowest", [0.0, 0.5])
def test_replies_to_many_addresses_asked_from_one_socket_are_judged_exactly(
    watch: Watch, port: int, family: Family, number: int, slowest: float
) -> None:
    """Each reply comes after 0 to 500 ms in any order, some are wrong; expected is the newest pending address."""
    if number > 16 and watch.sensor.features.mode == "netlink":
        pytest.skip("by design: without CAP_PERFMON a set holds 16 addresses (docs/findings.md)")
    chance = random.Random(f"{number} {family.name} {slowest}")  # noqa: S311
    six = family is V6
    addresses = [f"fd00:1::{n:x}" if six else f"10.1.0.{n}" for n in range(100, 100 + number)]
    foreign, client_address = ("fd00:1::1", "fd00:1::9") if six else ("10.1.0.1", "10.1.0.9")
    with Lab() as lab:
        server, client = lab.pair("server", [foreign, *addresses], "client", [client_address])
        with (
            bound(server, family.inet, family.wildcard, port) as serving,
            bound(client, family.inet, family.wildcard, 0) as asking,
        ):
            expected = Pending([], {})
            schedule: list[tuple[float, int, str, str]] = []
            for at, address in enumerate(addresses):
                asked = slowest * at / number / 10
                answered = asked + chance.uniform(0, slowest)
                schedule.append((asked, len(schedule), "ask", address))
                schedule.append((answered, len(schedule), "answer", address))
                if chance.random() < 0.5:
                    schedule.append((chance.uniform(asked, answered), len(schedule), "answer wrongly", ""))
            peer = None
            begin = time.monotonic()
            for at, _, what, address in sorted(schedule):
                time.sleep(max(0.0, begin + at - time.monotonic()))
                if what == "ask":
                    _, peer = ask(asking, address, port, serving)
                    expected.ask(address)
                    continue
                assert peer
                source = address or foreign
                serving.sendmsg([b"answer"], [source_control(family, source)], 0, peer)
                if address:
                    expected.answer(address)
                else:
                    expected.answer_wrongly()
            found = {finding.expected: count for finding, count in watch.findings(port).items()}
            assert found == expected.wrong


def test_address_that_was_answered_stays_a_right_source(watch: Watch, port: int) -> None:
    """A stream from A continues while the same client asks B."""
    with Lab() as lab:
        alone = lab.namespace("alone")
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            first = ask(client, "127.0.0.2", port, server)
            server.sendmsg([b"x"], [source_control(V4, "127.0.0.2")], 0, first[1])
            ask(client, "127.0.0.3", port, server)
            for _ in range(3):
                server.sendmsg([b"x"], [source_control(V4, "127.0.0.2")], 0, first[1])
            assert watch.count(port) == 0
            server.sendmsg([b"x"], [source_control(V4, "127.0.0.4")], 0, first[1])
            assert watch.count(port) == 1


def test_one_reply_answers_a_group_and_an_address(watch: Watch, port: int) -> None:
    """Afterwards the host may speak first, from another address."""
    with Lab() as lab:
        alone = lab.namespace("alone")
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            ask(client, "127.255.255.255", port, server)
            _, peer = ask(client, "127.0.0.2", port, server)
            server.sendmsg([b"x"], [source_control(V4, "127.0.0.2")], 0, peer)
            for _ in range(3):
                server.sendto(b"x", peer)
            assert watch.count(port) == 0


# ---- hosts that speak first ----


def test_replies_to_a_resolver_with_two_addresses_are_not_requests(watch: Watch, port: int) -> None:
    """The resolver uses a connected socket for each query, from either address, and reuses a port."""
    with Lab() as lab:
        resolver, upstream = lab.pair("resolver", ["10.1.0.1", "10.1.0.2"], "upstream", ["10.1.0.9"])
        with bound(upstream, socket.AF_INET, "0.0.0.0", 5300) as server:
            server.settimeout(PATIENCE_SECONDS)
            for source in ("10.1.0.1", "10.1.0.2", "10.1.0.1", "10.1.0.2"):
                with bound(resolver, socket.AF_INET, source, port) as query:
                    query.connect(("10.1.0.9", 5300))
                    query.settimeout(PATIENCE_SECONDS)
                    query.send(b"query")
                    server.sendto(*server.recvfrom(100))
                    query.recv(100)
            assert watch.count(port) == 0


def test_datagrams_after_a_right_reply_are_not_replies(watch: Watch, port: int) -> None:
    """A peer asks at the second address and gets its reply; then the host sends it a request from the first."""
    with Lab() as lab:
        alone = lab.namespace("alone")
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            _, peer = ask(client, "127.0.0.2", port, server)
            server.sendmsg([b"x"], [source_control(V4, "127.0.0.2")], 0, peer)
            for _ in range(3):
                server.sendto(b"and now I ask", peer)
            assert watch.count(port) == 0
            ask(client, "127.0.0.2", port, server)
            server.sendto(b"wrong", peer)
            assert watch.count(port) == 1


def test_gossip_started_by_either_side_is_not_a_finding(watch: Watch, port: int) -> None:
    """Both sides use one port; each speaks first now and then, and replies from the address asked."""
    with Lab() as lab:
        one, other = lab.pair("one", ["10.1.0.1", "10.1.0.2"], "other", ["10.1.0.9", "10.1.0.10"])
        with (
            bound(one, socket.AF_INET, "0.0.0.0", port) as left,
            bound(other, socket.AF_INET, "0.0.0.0", port) as right,
        ):
            for side in (left, right):
                servers.enable_pktinfo(side)
                side.settimeout(PATIENCE_SECONDS)
            for turn in range(20):
                asking, answering, addresses = (
                    (left, right, ("10.1.0.9", "10.1.0.10")) if turn % 2 else (right, left, ("10.1.0.1", "10.1.0.2"))
                )
                asking.sendto(b"ping", (addresses[turn // 2 % 2], port))
                _, control, _, peer = answering.recvmsg(100, socket.CMSG_SPACE(32))
                level, kind, asked = control[0]
                answering.sendmsg([b"pong"], [(level, kind, servers.reply_control(asked))], 0, peer)
                asking.recvfrom(100)
            assert watch.count(port) == 0


def tracked_pair(lab: Lab) -> tuple[Namespace, Namespace]:
    """Build a host with two addresses, 10.1.0.1 and .2, and conntrack; and a peer, 10.1.0.9."""
    host, peer = lab.pair("host", ["10.1.0.1", "10.1.0.2"], "peer", ["10.1.0.9"])
    host.nft("table inet t { chain c { type filter hook input priority filter; ct state established accept; }; }")
    return host, peer


def test_forged_requests_of_a_peer_do_not_make_requests_to_it_replies(
    packet_watch: Watch, load: Path, port: int
) -> None:
    """The forged requests are for another address; what this host sends to the peer stays its own request."""
    with Lab() as lab:
        host, peer = tracked_pair(lab)
        with (
            bound(host, socket.AF_INET, "0.0.0.0", port) as program,
            bound(peer, socket.AF_INET, "0.0.0.0", 1024) as server,
        ):
            program.settimeout(PATIENCE_SECONDS)
            server.settimeout(PATIENCE_SECONDS)

            def converse() -> None:
                program.sendto(b"request", ("10.1.0.9", 1024))
                server.sendto(*server.recvfrom(100))
                program.recvfrom(100)

            converse()
            # The forged ones' port is the first that `load flood` uses.
            sent = peer.run([str(load), "flood", "10.1.0.9", "1", "10.1.0.2", str(port), "1", "0.01"])
            assert int(sent) == 64
            program.settimeout(0)
            with pytest.raises(BlockingIOError):
                while True:
                    program.recvfrom(100)
            program.settimeout(PATIENCE_SECONDS)
            for _ in range(18):
                converse()
            assert packet_watch.count(port) == 0


def test_conversation_started_here_is_undecided_beside_a_forged_request(watch: Watch, port: int) -> None:
    """A client's connected socket continues while its peer's request at another address, to another socket of the same
    port, is pending: undecided in conntrack's reply direction, whoever sent that request.
    """
    port += 20_000  # a client's
    reuse = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with Lab() as lab:
        host, peer = tracked_pair(lab)
        with (
            bound(peer, socket.AF_INET, "0.0.0.0", 1024) as remote,
            bound(host, socket.AF_INET, "10.1.0.2", port, reuse) as listener,
            bound(host, socket.AF_INET, "10.1.0.1", port, reuse) as program,
        ):
            program.settimeout(PATIENCE_SECONDS)
            remote.settimeout(PATIENCE_SECONDS)
            program.connect(("10.1.0.9", 1024))
            program.send(b"request")
            remote.sendto(*remote.recvfrom(100))
            program.recv(100)
            ask(remote, "10.1.0.2", port, listener)
            before = watch.sensor.counters().undecided
            for _ in range(3):
                program.send(b"next request")
            assert watch.count(port) == 0
            if watch.sensor.features.mode == "packet":
                assert watch.sensor.counters().undecided - before == 3


def test_media_server_asked_at_eight_candidates_is_not_a_finding(watch: Watch, port: int) -> None:
    """WebRTC: one socket asks every address of a server (ICE). The server replies to each from the address asked, then
    streams from the chosen one while the checks continue.
    """
    addresses = [f"127.0.0.{number}" for number in range(2, 10)]
    with Lab() as lab:
        alone = lab.namespace("alone")
        with bound(alone, socket.AF_INET, "0.0.0.0", port) as server, alone.socket() as client:
            for turn in range(3):
                requests = [(address, ask(client, address, port, server)) for address in addresses]
                for address, (data, peer) in random.Random(turn).sample(requests, len(requests)):  # noqa: S311
                    server.sendmsg([data], [source_control(V4, address)], 0, peer)
                    server.sendmsg([b"media"], [source_control(V4, addresses[turn])], 0, peer)
            assert watch.count(port) == 0


def test_responder_asked_by_musl_at_three_addresses_is_not_a_finding(watch: Watch, folder: Path) -> None:
    """musl asks all of them at once from one socket: three addresses of one `udpwatch dns`, for A and AAAA."""
    needs("musl-gcc", "musl-tools")
    nameservers = [f"10.1.0.{number}" for number in (1, 2, 3)]
    (folder / "lookup.c").write_text(LOOKUP)
    subprocess.run(["musl-gcc", "-static", "-o", folder / "lookup", folder / "lookup.c"], check=True)
    (folder / "resolv").write_text("".join(f"nameserver {address}\n" for address in nameservers))
    (folder / "nsswitch.conf").write_text("hosts: dns\n")
    with Lab() as lab:
        node, client = lab.pair("node", nameservers, "client", ["10.1.0.9"])
        with Responder(node, "--address=/x.test/10.0.0.1"):
            for number in range(20):
                assert resolve(client, folder, "resolv", str(folder / "lookup"), f"{number}.x.test") == ["10.0.0.1"]
            found = watch.findings(53)
            assert not [finding for finding in found if finding.expected in nameservers]


# ---- extension headers ----

SEND_WITH_HEADERS = """
import socket, struct, sys
source, peer_port, destination, port, count = sys.argv[1:]
body = b"requests"  # an even number of bytes, for the checksum
udp = struct.pack("!HHHH", int(peer_port), int(port), 8 + len(body), 0) + body
ends = [socket.inet_pton(socket.AF_INET6, each) for each in (source, destination)]
words = struct.unpack(f"!{(32 + 8 + len(udp)) // 2}H", b"".join(ends) + struct.pack("!II", len(udp), 17) + udp)
total = sum(words)
while total >> 16:
    total = (total & 0xFFFF) + (total >> 16)
udp = udp[:6] + struct.pack("!H", ~total & 0xFFFF or 0xFFFF) + udp[8:]
following = [60] * (int(count) - 1) + [17]
options = b"".join(struct.pack("!BB6B", each, 0, 1, 4, 0, 0, 0, 0) for each in following)  # PadN of six
payload = options + udp
packet = struct.pack("!IHBB", 6 << 28, len(payload), 60, 64) + ends[0] + ends[1] + payload
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
    raw.sendto(packet, (destination, 0))
"""


def test_requests_with_too_many_extension_headers_are_counted(packet_watch: Watch, port: int) -> None:
    """Seven headers are read. After a request with forty the wrong reply is not seen, and this is counted. Newer
    kernels deliver no such request.
    """
    with Lab() as lab:
        server, client = lab.pair("server", ["fd00:1::1"], "client", ["fd00:1::9"])
        server.ip("addr add fd00:1::2/64 dev eth0 nodad preferred_lft 0")
        with bound(server, socket.AF_INET6, "::", port) as serving:
            serving.settimeout(3)
            for headers, wrong, unparsed in ((7, 1, 0), (40, 1, 2)):  # as it leaves, and as it arrives
                before = packet_watch.sensor.counters().unparsed
                words = ("fd00:1::9", str(40_000 + headers), "fd00:1::2", str(port), str(headers))
                client.run([sys.executable, "-c", SEND_WITH_HEADERS, *words])
                try:
                    request = serving.recvfrom(100)
                except TimeoutError:
                    assert headers == 40
                    break
                serving.sendto(*request)
                assert packet_watch.count(port) == wrong
                assert packet_watch.sensor.counters().unparsed - before == unparsed


def test_undecided_events_do_not_delay_others(netlink_watch: Watch, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More events are undecided than there is time to ask about; another server's event comes with the next sample.
    Conntrack's answers and the cost of a question are scripted: a guest's emulated CPU takes 20 ms for one.
    """
    clock, undecided = [0.0], range(port + 1, port + 41)

    def is_wrong(finding: Finding, *_: object) -> bool | None:
        clock[0] += 0.05
        return None if finding.port in undecided else True

    replies = netlink_watch.sensor._counting and netlink_watch.sensor._counting.replies
    assert replies
    with Lab() as lab:
        place = lab.namespace("place")
        with place.socket() as client:
            for each in (*undecided, port):
                if each == port:
                    monkeypatch.setattr(replies._conntrack, "is_wrong", is_wrong)
                    monkeypatch.setattr(sockets.time, "monotonic", lambda: clock[0])
                    netlink_watch.read()
                    netlink_watch.read()  # those that wait take all the time there is
                with bound(place, socket.AF_INET, "0.0.0.0", each) as server:
                    server.sendto(*ask(client, "127.0.0.2", each, server))
            netlink_watch.read()
            assert [
                event.finding.port for event in netlink_watch._events if event.finding.port in (port, *undecided)
            ] == [port]
    monkeypatch.undo()
