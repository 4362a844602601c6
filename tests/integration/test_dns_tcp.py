"""TCP: idle, slow, unread and half-closed connections, and their cost to other clients."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dns.message
import pytest
from dns_server import (
    ANSWER_SECONDS,
    PORT,
    Asked,
    FakeServer,
    Responder,
    ask,
    bare_query,
    connected,
    rcode,
    receive_message,
    right,
    send_message,
    texts,
    write,
)
from dnsmasq import dnsmasq
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace

NODE = "10.1.0.1"
IDLE = 1_000
BIG = 400  # addresses: 6 KB


@pytest.fixture(scope="module")
def lab() -> Iterator[tuple[Namespace, Namespace]]:
    """A node, and a client with two IPv4 addresses and many IPv6 addresses."""
    with Lab() as built:
        yield built.pair("node", [NODE, "fd01::1"], "client", ["10.1.0.2", "fd01::2"])


@pytest.fixture(scope="module")
def upstream(lab: tuple[Namespace, Namespace]) -> Iterator[FakeServer]:
    def script(asked: Asked) -> bytes:
        release.wait(4)
        return right(asked)

    with FakeServer(lab[0], "127.0.0.99", script, port=5300) as server:
        yield server


release = threading.Event()


@pytest.fixture(scope="module")
def responder(
    lab: tuple[Namespace, Namespace], upstream: FakeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Responder]:
    release.set()
    many = [f"10.{number >> 8}.{number & 255}.1 big.test" for number in range(BIG)]
    hosts = write(tmp_path_factory.mktemp("dns") / "hosts", "10.0.0.1 host.test", *many)
    with Responder(lab[0], f"--addn-hosts={hosts}", "--server=127.0.0.99#5300", "--cache-size=0") as running:
        yield running


@contextlib.contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"no more than {hard} descriptors: raise the limit (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("address", [NODE, "fd01::1"])
def test_thousand_idle_connections(lab: tuple[Namespace, Namespace], responder: Responder, address: str) -> None:
    """From one client (for IPv6 a /64): other clients, and this one, still get responses within a second."""
    node, client = lab
    if ":" in address:
        client.ip(*(f"addr add fd01::1:{number:x}/64 dev eth0 nodad" for number in range(50)))
    with contextlib.ExitStack() as stack, many_descriptors(IDLE + 500):
        for number in range(IDLE):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            link = stack.enter_context(client.socket(family, socket.SOCK_STREAM))
            if ":" in address:
                link.bind((f"fd01::1:{number % 50:x}", 0))
            link.settimeout(10)
            link.connect((address, PORT))
            if number % 2:
                link.send(b"\0")  # half a length
        begun = time.monotonic()
        assert texts(ask(node, "127.0.0.1", "host.test", tcp=True)) == ["10.0.0.1"]
        assert time.monotonic() - begun < 1
        assert texts(ask(client, address, "host.test", tcp=True)) == ["10.0.0.1"]
        assert responder.metric("tcp_connections") <= 65
        assert responder.metric("tcp_connections_closed_total") > 800
    wait_for(lambda: responder.metric("tcp_connections") == 0, "them to be forgotten")


def test_idle_connections_are_closed(lab: tuple[Namespace, Namespace], responder: Responder) -> None:
    with connected(lab[1], NODE, socket.SOCK_STREAM) as link:
        link.settimeout(60)
        send_message(link, bare_query("host.test"))
        assert receive_message(link)
        link.send(b"\0")
        assert link.recv(1) == b""  # closed by the other side


def test_slow_reader(
    lab: tuple[Namespace, Namespace], responder: Responder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients ask for megabytes and never read: memory does not grow, other clients get responses."""
    before, questions = responder.resident_kib(), 0
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connected(lab[1], NODE, socket.SOCK_STREAM)) for _ in range(50)]
        for link in links:
            link.settimeout(0)
        query = bare_query("big.test")
        batch = (struct.pack("!H", len(query)) + query) * 500
        for link in links:
            with contextlib.suppress(BlockingIOError):
                questions += link.send(batch) // (len(query) + 2)
        assert questions > 10_000  # 64 MB of answers
        assert texts(ask(lab[0], "127.0.0.1", "host.test", tcp=True)) == ["10.0.0.1"]
        for link in links:  # each is ended, having taken nothing
            wait_for(lambda link=link: _has_ended(link, batch), "the end of the connection")
        after = responder.resident_kib()
    with capsys.disabled():
        print(f" [slow readers: {before >> 10} MB before, {after >> 10} MB after]", end="")
    assert after - before < 30 << 10
    wait_for(lambda: responder.metric("tcp_connections") == 0, "them to be forgotten")


def _has_ended(link: socket.socket, more: bytes) -> bool:
    try:
        link.send(more[:31])
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def test_half_close(lab: tuple[Namespace, Namespace], responder: Responder) -> None:
    """A half-closed client still gets its responses, from memory and from upstream."""
    release.clear()
    with connected(lab[1], NODE, socket.SOCK_STREAM) as link:
        send_message(link, bare_query("half.example", 1))
        send_message(link, bare_query("host.test", 2))
        link.shutdown(socket.SHUT_WR)
        assert dns.message.from_wire(receive_message(link)).id == 2  # needs not wait for the other
        release.set()
        assert texts(dns.message.from_wire(receive_message(link))) == ["192.0.2.80"]
        assert receive_message(link) == b""


@pytest.mark.parametrize("name", ["host.test", "pipeline{}.example"])
def test_pipelined_queries(lab: tuple[Namespace, Namespace], responder: Responder, name: str) -> None:
    with connected(lab[1], NODE, socket.SOCK_STREAM) as link:
        queries = [bare_query(name.format(number), number) for number in range(2_000)]
        data = b"".join(struct.pack("!H", len(query)) + query for query in queries)
        writer = threading.Thread(target=link.sendall, args=(data,))
        writer.start()
        answers = [dns.message.from_wire(receive_message(link)) for _ in queries]
        writer.join()
        assert sorted(answer.id for answer in answers) == list(range(2_000))
        assert all(rcode(answer) == "NOERROR" and answer.answer for answer in answers)


def test_query_byte_by_byte(lab: tuple[Namespace, Namespace], responder: Responder) -> None:
    with connected(lab[1], NODE, socket.SOCK_STREAM) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        query = bare_query("host.test", 77)
        for octet in struct.pack("!H", len(query)) + query:
            link.send(bytes((octet,)))
        assert texts(dns.message.from_wire(receive_message(link))) == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("data", "answered"),
    [
        (b"\0\0", False),  # no message
        (b"\0\5hello", False),  # too short to be answered
        (b"\xff\xff" + bytes(65_535), True),  # FORMERR or NOTIMP: there is a header
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(20_000), None),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(6_000), None),  # TLS
    ],
)
def test_garbage(lab: tuple[Namespace, Namespace], responder: Responder, data: bytes, answered: bool | None) -> None:
    with connected(lab[1], NODE, socket.SOCK_STREAM) as link:
        with contextlib.suppress(OSError):
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
        try:
            answer = receive_message(link)
        except ConnectionResetError:
            answer = b""
        assert answered is None or bool(answer) == answered
    assert texts(ask(lab[1], NODE, "host.test", tcp=True)) == ["10.0.0.1"]


def test_reset_in_the_middle(lab: tuple[Namespace, Namespace], responder: Responder) -> None:
    """Clients that disconnect while their query is in flight."""
    for number in range(50):
        with connected(lab[1], NODE, socket.SOCK_STREAM) as link:
            send_message(link, bare_query(f"gone{number}.example"))
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: responder.metric("tcp_connections") == 0, "them to be forgotten")
    assert texts(ask(lab[1], NODE, "host.test", tcp=True)) == ["10.0.0.1"]


def test_large_responses(lab: tuple[Namespace, Namespace], responder: Responder) -> None:
    """Over UDP they are truncated, with the records that fit; over TCP they are complete."""
    short = ask(lab[1], NODE, "big.test")
    assert short.flags & 0x0200 and short.question
    assert len(texts(short)) == (512 - 12 - len(b"\3big\4test\0") - 4) // 16
    assert set(texts(short)) < set(texts(ask(lab[1], NODE, "big.test", tcp=True)))
    assert len(texts(ask(lab[1], NODE, "big.test", tcp=True))) == BIG


def test_few_descriptors(tmp_path: Path) -> None:
    """More connections than descriptors: it recovers as soon as some are closed."""
    hosts = write(tmp_path / "hosts", "10.0.0.1 host.test")
    with Lab() as built:
        node = built.namespace("node")
        with Responder(node, f"--addn-hosts={hosts}", wrapper=("prlimit", "--nofile=40:40")):
            with contextlib.ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(connected(node, "127.0.0.1", socket.SOCK_STREAM))
                assert texts(ask(node, "127.0.0.1", "host.test")) == ["10.0.0.1"]
            wait_for(lambda: _answered(node), "TCP to be answered again")


@pytest.mark.parametrize("theirs", [False, True], ids=["udpwatch", "dnsmasq"])
def test_number_of_connections_beside_dnsmasq(theirs: bool) -> None:
    """Neither serves more at a time than configured: udpwatch closes an idle one, dnsmasq lets the new one wait."""
    options = ("--max-tcp-connections=2", "--host-record=ready.example,192.0.2.1")
    with Lab() as built, contextlib.ExitStack() as stack:
        node = built.namespace("node")
        node.ip("link set lo up")
        stack.enter_context(dnsmasq(node, *options) if theirs else Responder(node, *options))
        links = []
        for _ in range(2):
            links.append(stack.enter_context(connected(node, "127.0.0.1", socket.SOCK_STREAM)))
            send_message(links[-1], bare_query("ready.example"))
            assert receive_message(links[-1])
        third = stack.enter_context(connected(node, "127.0.0.1", socket.SOCK_STREAM))
        third.settimeout(1.5 if theirs else ANSWER_SECONDS)
        send_message(third, bare_query("ready.example"))
        if theirs:
            with pytest.raises(TimeoutError):
                receive_message(third)
        else:
            assert receive_message(third)
            with contextlib.suppress(ConnectionResetError):
                assert not links[0].recv(1)


def _answered(node: Namespace) -> bool:
    with contextlib.suppress(OSError, dns.exception.DNSException, AssertionError):
        return texts(ask(node, "127.0.0.1", "host.test", tcp=True, seconds=ANSWER_SECONDS)) == ["10.0.0.1"]
    return False
