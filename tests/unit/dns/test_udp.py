"""The UDP server's real code over a socket double: any address and interface, no root."""

from __future__ import annotations

import ipaddress
import itertools
import socket
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

import dns_messages as m
import pytest
from local_addresses import local
from stepped_packet_loop import SteppedPacketLoop
from udp_double import Datagram, UdpDouble
from waiting import wait_for

from udpwatch.dns import udp as module
from udpwatch.dns.admission import Admission
from udpwatch.dns.cache import Cache
from udpwatch.dns.message import Rcode
from udpwatch.dns.metrics import Metrics
from udpwatch.dns.names import name_from_text
from udpwatch.dns.packet_loop import PacketLoop
from udpwatch.dns.responder import LogQuery, Reply, Responder
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import HostRecord, Server, Settings
from udpwatch.dns.udp import BATCHES_IN_A_ROW, MEMO_ENTRIES, UdpQuery, UdpServer
from udpwatch.dns.udp_socket import BATCH, SLOT, UdpSocket, open_socket
from udpwatch.dns.zone import build

CLIENT, CLIENT_6 = "10.1.0.2", "fd01::2"
KNOWN = m.query("host.test")


class Case:
    """A server that knows host.test, and one socket."""

    def __init__(
        self,
        family: socket.AddressFamily = socket.AF_INET,
        checked: bool = False,
        log: bool = False,
        **settings: object,
    ) -> None:
        addresses = ("192.0.2.1", "2001:db8::1")
        host = HostRecord((name_from_text("host.test"),), addresses)
        made = Settings(hosts=False, host_records=(host,), **settings)  # type: ignore[arg-type]
        self.metrics = Metrics()
        self.responder = Responder(made, build(made, pytest.fail), Cache(100, 0))
        self.admission = Admission(made)
        self.forwarded: list[list[UdpQuery]] = []
        self.logged: list[object] = []
        tell = (lambda *found: self.logged.append(found)) if log else None
        self.loop = SteppedPacketLoop()
        self.server = self.server_in(self.loop, tell)  # type: ignore[arg-type]
        self.link = UdpDouble(family, checked)
        self.server.add(self.link)
        self.looked_up = 0
        respond = self.responder.respond

        def counted(*arguments: object) -> object:
            self.looked_up += 1
            return respond(*arguments)  # type: ignore[arg-type]

        self.responder.respond = counted  # type: ignore[method-assign,assignment]

    def server_in(self, loop: PacketLoop, log_query: LogQuery | None = None) -> UdpServer:
        """A server with the parts of this case."""
        return UdpServer(loop, self.responder, self.metrics, self.admission, self.forwarded.append, log_query)

    def serve(self, *datagrams: Datagram) -> list[bytes]:
        """Let datagrams arrive; the responses to them."""
        self.link.put(*datagrams)
        before = len(self.link.sent)
        self.server.serve(self.link)
        return [sent.data for sent in self.link.sent[before:]]

    def dropped(self) -> dict[str, int]:
        return {reason: cell[0] for reason, cell in self.metrics.dropped.items() if cell[0]}


@pytest.fixture
def case() -> Case:
    return Case(local_service=False)


@pytest.mark.parametrize("asked", ["10.1.0.1", "172.17.0.1", "127.0.0.1"])
def test_response_leaves_from_the_address_that_was_asked(case: Case, asked: str) -> None:
    for _ in range(2):  # looked up, then remembered
        case.serve(Datagram(KNOWN, CLIENT, 4000, asked, index=7))
    for sent in case.link.sent:
        assert (sent.client, sent.port, sent.source) == (CLIENT, 4000, asked)
        assert sent.index == 0, "routing picks the interface"
    assert len(case.link.sent) == 2


@pytest.mark.parametrize(("asked", "index"), [("fd01::1", 0), ("2001:db8::1", 0), ("fe80::1", 7)])
def test_ipv6_response_leaves_from_the_address_that_was_asked(asked: str, index: int) -> None:
    case = Case(socket.AF_INET6, local_service=False)
    for _ in range(2):
        case.serve(Datagram(m.query("host.test", m.AAAA), CLIENT_6, 4000, asked, index=7))
    for sent in case.link.sent:
        assert (sent.client, sent.port, sent.source) == (CLIENT_6, 4000, asked)
        assert sent.index == index, "only a link-local address needs its interface"
    assert len(case.link.sent) == 2


def test_forwarded_query_keeps_the_address_that_was_asked() -> None:
    for family, client, asked, index in (
        (socket.AF_INET, CLIENT, "172.17.0.1", 0),
        (socket.AF_INET6, CLIENT_6, "fd01::1", 0),
        (socket.AF_INET6, CLIENT_6, "fe80::1", 7),
    ):
        case = Case(family, local_service=False)
        case.responder.routes = Routes((Server("198.51.100.53"),))
        assert not case.serve(Datagram(m.query("www.example"), client, 4000, asked, index=7))
        ((pending,),) = case.forwarded
        assert pending.client == ipaddress.ip_address(client).packed
        assert pending.peer() == (client, 4000)
        pending.deliver(Reply(b"response", "forward", 0))
        assert not case.link.sent, "it is sent at the end of the turn"
        case.loop.turn()
        (sent,) = case.link.sent
        assert sent.data == b"response"
        assert (sent.client, sent.port, sent.source, sent.index) == (client, 4000, asked, index)


def test_each_response_has_the_id_of_its_query(case: Case) -> None:
    idents = range(BATCH)
    responses = case.serve(*(Datagram(m.query("host.test", ident=ident), CLIENT, 4000 + ident) for ident in idents))
    assert [int.from_bytes(data[:2], "big") for data in responses] == list(idents)
    assert [sent.port for sent in case.link.sent] == [4000 + ident for ident in idents]
    assert len({data[2:] for data in responses}) == 1


def test_unanswered_datagrams_do_not_move_responses_to_other_clients(case: Case) -> None:
    """A batch is sent in runs of consecutive slots."""
    queries = [
        Datagram(m.query("host.test", ident=number) if number % 3 else b"short", CLIENT, 4000 + number)
        for number in range(BATCH)
    ]
    case.serve(*queries)
    expected = [(number, 4000 + number) for number in range(BATCH) if number % 3]
    assert [(int.from_bytes(sent.data[:2], "big"), sent.port) for sent in case.link.sent] == expected
    assert case.metrics.malformed["short"][0] == BATCH - len(expected)


def test_queries_for_upstream_are_handed_over_in_one_batch(case: Case) -> None:
    case.responder.routes = Routes((Server("198.51.100.53"),))
    case.serve(
        *(Datagram(m.query(f"n{number}.example" if number % 2 else "host.test"), CLIENT) for number in range(10))
    )
    (batch,) = case.forwarded
    assert [pending.forward.query.name for pending in batch] == [
        m.name(f"n{number}.example") for number in (1, 3, 5, 7, 9)
    ]
    assert len(case.link.sent) == 5


def test_full_batches_leave_other_sockets_their_turn(case: Case) -> None:
    case.link.put(*(Datagram(KNOWN, CLIENT) for _ in range((BATCHES_IN_A_ROW + 1) * BATCH)))
    case.server.serve(case.link)
    assert case.link.batches == [BATCH] * BATCHES_IN_A_ROW
    assert len(case.link.inbox) == BATCH


def test_query_longer_than_a_slot_is_malformed(case: Case) -> None:
    padding = m.record(m.TXT, bytes(SLOT), owner=b"\0")
    (response,) = case.serve(Datagram(m.query("host.test", m.A, padding), CLIENT))
    assert m.flags_of(response) & 0xF == Rcode.FORMERR


def test_failed_sends_are_counted(case: Case) -> None:
    case.link.failing = 3
    assert len(case.serve(*(Datagram(KNOWN, CLIENT) for _ in range(5)))) == 2
    assert case.dropped() == {"send": 3}
    assert sum(case.metrics.duration["memory"].counts) == 2


# ---- memory ----


def test_same_query_is_answered_from_memory(case: Case) -> None:
    responses = [case.serve(Datagram(KNOWN, CLIENT)) for _ in range(3)]
    assert responses[0] == responses[1] == responses[2]
    assert case.looked_up == 1
    ((labels, cell),) = case.metrics.answered.items()
    assert (labels[0], cell[0]) == ("udp", 3)


def test_changed_zone_replaces_remembered_responses(case: Case) -> None:
    before = case.serve(Datagram(KNOWN, CLIENT))
    settings = Settings(hosts=False, host_records=(HostRecord((name_from_text("host.test"),), ("192.0.2.99",)),))
    case.responder.zone = build(settings, pytest.fail)
    assert case.serve(Datagram(KNOWN, CLIENT)) == before
    case.server.invalidate()
    (after,) = case.serve(Datagram(KNOWN, CLIENT))
    assert after.endswith(bytes((192, 0, 2, 99)))


def test_memory_ends_with_the_response_s_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    reply = Reply(b"\0\0cached", "cache", 0, None, until=101.0)
    case.responder.respond = lambda *_: reply  # type: ignore[method-assign]
    case.metrics.malformed["cache"] = [0]
    case.serve(Datagram(KNOWN, CLIENT))
    case.responder.respond = lambda *_: Reply(b"\0\0looked up", "cache", 0, None)  # type: ignore[method-assign]
    found = []
    for clock[0] in (100.9, 101.0):
        found += [data[2:] for data in case.serve(Datagram(KNOWN, CLIENT))]
    assert found == [b"cached", b"looked up"]


def test_memory_is_bounded(case: Case) -> None:
    for first in range(0, MEMO_ENTRIES + BATCH, BATCH):
        # Every type of a name with an address is answered, so each query is another one to remember.
        case.serve(*(Datagram(m.query("host.test", 1000 + first + number), CLIENT) for number in range(BATCH)))
    assert 0 < len(case.server._memos[socket.AF_INET]) <= MEMO_ENTRIES


def test_logged_queries_are_not_answered_from_memory() -> None:
    case = Case(log=True, local_service=False)
    for _ in range(3):
        case.serve(Datagram(KNOWN, CLIENT, 4000))
    assert [found[1:] for found in case.logged] == [(CLIENT, 4000)] * 3  # type: ignore[index]


# ---- admission ----


@pytest.mark.parametrize(
    ("family", "datagram"),
    [
        (socket.AF_INET, Datagram(KNOWN, CLIENT, asked="224.0.0.251", source="10.1.0.1")),
        (socket.AF_INET, Datagram(KNOWN, CLIENT, asked="10.1.0.255", source="10.1.0.1")),
        (socket.AF_INET, Datagram(KNOWN, CLIENT, asked="0.0.0.0")),
        (socket.AF_INET6, Datagram(KNOWN, CLIENT_6, asked="ff02::fb")),
        (socket.AF_INET6, Datagram(KNOWN, CLIENT_6, asked="::")),
    ],
)
def test_query_to_a_group_gets_no_response(family: socket.AddressFamily, datagram: Datagram) -> None:
    case = Case(family, local_service=False)
    assert not case.serve(datagram, datagram)
    assert case.dropped() == {"group": 2}


def test_client_at_port_0_gets_no_response(case: Case) -> None:
    assert not case.serve(Datagram(KNOWN, CLIENT, 0))
    assert case.dropped() == {"source": 1}


def test_only_connected_networks_are_served() -> None:
    case = Case()
    case.admission.update([local("10.1.0.1/24")])
    assert len(case.serve(Datagram(KNOWN, CLIENT))) == 1
    stranger = Datagram(KNOWN, "192.0.2.7")
    assert not case.serve(stranger, stranger), "a remembered response is not for everybody"
    assert case.dropped() == {"policy": 2}
    case.admission.update([local("192.0.2.1/24")])
    case.server.readmit()
    assert len(case.serve(stranger)) == 1
    assert not case.serve(Datagram(KNOWN, CLIENT)), "its network has gone"


def test_interface_decides_whatever_address_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """lan0 is served: a query on wan0 for lan0's address is not, nor when its response is remembered."""
    monkeypatch.setattr(socket, "if_indextoname", {2: "lan0", 3: "wan0"}.__getitem__)
    case = Case(checked=True, local_service=False, interfaces=("lan0",))
    lan, wan = Datagram(KNOWN, CLIENT, index=2), Datagram(KNOWN, CLIENT, index=3)
    assert len(case.serve(lan, wan, lan, wan)) == 2
    assert case.dropped() == {"policy": 2}


def test_interface_index_that_is_used_again_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {2: "lan0"}
    monkeypatch.setattr(socket, "if_indextoname", names.__getitem__)
    case = Case(checked=True, local_service=False, interfaces=("lan0",))
    assert len(case.serve(Datagram(KNOWN, CLIENT, index=2))) == 1
    names[2] = "wan0"
    case.admission.update([])
    case.server.readmit()
    assert not case.serve(Datagram(KNOWN, CLIENT, index=2))


def test_listen_address_is_served_on_every_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_indextoname", {3: "wan0"}.__getitem__)
    case = Case(checked=True, local_service=False, interfaces=("lan0",), listen_addresses=("10.1.0.9",))
    assert len(case.serve(Datagram(KNOWN, CLIENT, asked="10.1.0.9", index=3))) == 1
    assert not case.serve(Datagram(KNOWN, CLIENT, asked="10.1.0.1", index=3))


# ---- what must not end the thread ----


def test_internal_error_costs_one_query(case: Case) -> None:
    respond: Callable[..., object] = case.responder.respond

    def broken(data: bytes, now: float, *rest: object) -> object:
        if b"bomb" in data:
            raise ZeroDivisionError
        return respond(data, now, *rest)

    case.responder.respond = broken  # type: ignore[method-assign,assignment]
    queries = [m.query(name, ident=ident) for ident, name in enumerate(("host.test", "bomb.test", "host.test"))]
    assert [data[:2] for data in case.serve(*(Datagram(query, CLIENT) for query in queries))] == [b"\0\0", b"\0\2"]


@pytest.mark.parametrize("data", [b"", b"\0", b"\x12\x34" + bytes(9), m.response("host.test")])
def test_bytes_that_are_no_query_get_no_response(case: Case, data: bytes) -> None:
    assert not case.serve(Datagram(data, CLIENT))
    assert sum(cell[0] for cell in case.metrics.malformed.values()) == 1


def test_responses_of_one_batch_differ(case: Case) -> None:
    names = ["host.test", "a.test", "host.test", "b.test"]
    responses = case.serve(*(Datagram(m.query(name), CLIENT) for name in names))
    assert [m.flags_of(data) & 0xF for data in responses] == [0, Rcode.REFUSED, 0, Rcode.REFUSED]
    assert all(m.name(name) in data for name, data in zip(names, responses, strict=True))
    assert not any(left == right for left, right in pairwise(responses))


# ---- responses of upstream servers ----


def forwarded(case: Case, *links: UdpDouble, names: int = 1) -> list[UdpQuery]:
    """Queries that need an upstream server, from the sockets in turn; client ports from 4000."""
    case.responder.routes = Routes((Server("198.51.100.53"),))
    for number in range(names):
        link = links[number % len(links)]
        client = CLIENT if link.family == socket.AF_INET else CLIENT_6
        asked = "10.1.0.1" if link.family == socket.AF_INET else "fd01::1"
        link.put(Datagram(m.query(f"n{number}.example", ident=number), client, 4000 + number, asked))
        case.server.serve(link)
    return [query for batch in case.forwarded for query in batch]


def reply_to(query: UdpQuery, size: int = 100) -> Reply:
    """A response of a size of its own."""
    number = query.forward.query.id
    return Reply(
        number.to_bytes(2, "big") + bytes((number % 256,)) * (size + number), "forward", 0, query.forward.query
    )


def expected(queries: list[UdpQuery]) -> list[tuple[bytes, int]]:
    return [(reply_to(query).data, query.peer()[1]) for query in queries]


def got(link: UdpDouble) -> list[tuple[bytes, int]]:
    return [(sent.data, sent.port) for sent in link.sent]


def test_responses_of_a_turn_are_sent_in_one_batch(case: Case) -> None:
    queries = forwarded(case, case.link, names=5)
    for query in reversed(queries):
        query.deliver(reply_to(query))
    assert not case.link.sends
    case.loop.turn()
    assert case.link.sends == [5]
    assert got(case.link) == expected(queries[::-1])
    case.loop.turn()
    assert case.link.sends == [5], "once"
    ((labels, cell),) = case.metrics.answered.items()
    assert (labels[:3], labels[4], cell[0]) == (("udp", "1", "A"), "forward", 5)


def test_full_batch_is_sent_at_once(case: Case) -> None:
    queries = forwarded(case, case.link, names=2 * BATCH + 1)
    for number, query in enumerate(queries, 1):
        query.deliver(reply_to(query))
        assert case.link.sends == [BATCH] * ((number - 1) // BATCH)
    case.loop.turn()
    assert case.link.sends == [BATCH, BATCH, 1]
    assert got(case.link) == expected(queries)


def test_short_response_after_a_long_one_is_not_longer(case: Case) -> None:
    """The batch's memory is used again."""
    (query,) = forwarded(case, case.link)
    for data in (b"\0\7" + b"x" * (SLOT - 2), b"\0\7short"):
        query.deliver(Reply(data, "forward", 0))
        case.loop.turn()
        assert case.link.sent.pop().data == data


def test_responses_to_several_sockets_leave_through_their_own(case: Case) -> None:
    other, sixth = UdpDouble(), UdpDouble(socket.AF_INET6)
    links = (case.link, other, sixth)
    for link in (other, sixth):
        case.server.add(link)
    queries = forwarded(case, *links, names=12)
    for query in queries:
        query.deliver(reply_to(query))
    case.loop.turn()
    for number, link in enumerate(links):
        assert got(link) == expected(queries[number::3])
    assert not case.dropped()


def test_responses_that_cannot_be_sent_are_counted(case: Case) -> None:
    queries = forwarded(case, case.link, names=5)
    case.link.failing = 2
    for query in queries:
        query.deliver(reply_to(query))
    case.loop.turn()
    assert got(case.link) == expected(queries[2:])
    assert case.dropped() == {"send": 2}


@pytest.mark.parametrize("delivered_first", [False, True])
def test_response_for_a_closed_socket_is_counted(case: Case, delivered_first: bool) -> None:
    other = UdpDouble()
    case.server.add(other)
    gone, still = forwarded(case, case.link, other, names=2)
    if delivered_first:
        gone.deliver(reply_to(gone))
    case.server.remove(case.link)
    assert case.link.closed
    if not delivered_first:
        gone.deliver(reply_to(gone))
    still.deliver(reply_to(still))
    case.loop.turn()
    assert (got(case.link), got(other)) == ([], expected([still]))
    assert case.dropped() == {"send": 1}


def test_close_sends_what_is_left(case: Case) -> None:
    (query,) = forwarded(case, case.link)
    query.deliver(reply_to(query))
    case.server.close()
    assert got(case.link) == expected([query])
    assert case.link.closed
    assert not case.loop.handlers
    case.loop.turn()
    assert (len(case.link.sent), case.dropped()) == (1, {})


def test_repeated_query_has_the_same_origin(case: Case) -> None:
    case.responder.routes = Routes((Server("198.51.100.53"),))
    first = Datagram(m.query("www.example", ident=1), CLIENT, 4000)
    others = (Datagram(m.query("www.example", ident=2), CLIENT, 4000), Datagram(first.data, CLIENT, 4001))
    case.serve(first, first, *others)
    ((one, same, other_id, other_port),) = case.forwarded
    assert one.origin == same.origin
    assert len({one.origin, other_id.origin, other_port.origin}) == 3
    assert not one.must_answer


# ---- real sockets ----


def ask(link: UdpSocket, query: bytes) -> bytes:
    """A client's query over a real socket; the response must come from the address that was asked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect(link.link.getsockname())
        client.send(query)
        return client.recv(512)


def test_thread_serves_a_real_socket_and_closes_it(case: Case) -> None:
    link = open_socket(("127.0.0.1", 0), socket.AF_INET, checked=False)
    loop = PacketLoop()
    server = case.server_in(loop)
    loop.at_end(server.close)
    loop.start()
    try:
        server.add(link)
        assert ask(link, KNOWN).endswith(bytes((192, 0, 2, 1)))
    finally:
        loop.stop()
    assert link.link.fileno() == -1
    assert not loop.is_alive()


def test_socket_that_is_removed_is_closed_and_others_are_served(case: Case) -> None:
    links = [open_socket(("127.0.0.1", 0), socket.AF_INET, checked=False) for _ in range(2)]
    loop = PacketLoop()
    server = case.server_in(loop)
    loop.at_end(server.close)
    loop.start()
    try:
        for link in links:
            server.add(link)
            ask(link, KNOWN)
        server.remove(links[0])
        server.remove(links[0])
        assert ask(links[1], KNOWN).endswith(bytes((192, 0, 2, 1)))
        wait_for(lambda: links[0].link.fileno() == -1, "the socket to close")
        assert ask(links[1], KNOWN).endswith(bytes((192, 0, 2, 1)))
    finally:
        loop.stop()
    assert links[1].link.fileno() == -1


def test_responses_of_upstream_servers_go_back_to_their_clients_over_real_sockets(case: Case) -> None:
    """More than a batch, over two sockets in turn; then one of them is closed."""
    case.responder.routes = Routes((Server("198.51.100.53"),))
    loop = PacketLoop()
    server = case.server_in(loop)
    loop.at_end(server.close)
    links = [open_socket(("127.0.0.1", 0), socket.AF_INET, checked=False) for _ in range(2)]
    for link in links:
        server.add(link)
    number = BATCH + 6
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(number)]
        for ident, client in enumerate(clients):
            client.settimeout(10)
            client.connect(links[ident % 2].link.getsockname())
            client.send(m.query(f"n{ident}.example", ident=ident))
        loop.start()
        stack.callback(loop.stop)
        wait_for(lambda: sum(map(len, case.forwarded)) == number, "the queries")
        queries = sorted(itertools.chain(*case.forwarded), key=lambda each: each.forward.query.id)
        loop.post(lambda: [each.deliver(reply_to(each)) for each in queries] and None)
        for client, query in zip(clients, queries, strict=True):
            assert client.recv(4096) == reply_to(query).data
        assert not case.dropped()
        server.remove(links[0])
        loop.post(lambda: [each.deliver(reply_to(each)) for each in queries] and None)
        for client, query in zip(clients[1::2], queries[1::2], strict=True):
            assert client.recv(4096) == reply_to(query).data
        wait_for(case.dropped, "the count")
        loop.stop()
    assert case.dropped() == {"send": number // 2}
