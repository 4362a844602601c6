"""Queries that come back from upstream servers. Over a network double, in virtual time."""

from __future__ import annotations

import asyncio

import dns_messages as m
import pytest
from upstream_double import UpstreamNetwork
from virtual_packet_loop import VirtualPacketLoop
from virtual_time import run, turns

from udpwatch.dns.loop_detection import MAX_TESTED, OPEN_SECONDS, LoopDetector
from udpwatch.dns.message import parse_query
from udpwatch.dns.settings import Server

FIRST, SECOND, THIRD = (Server(f"192.0.2.{number}") for number in (1, 2, 3))


class Case:
    """A detector. Create it in the event loop."""

    def __init__(self) -> None:
        self.network, self.found = UpstreamNetwork(), 0
        self.detector = LoopDetector(VirtualPacketLoop(), self.network, self.on_loop)

    def on_loop(self) -> None:
        self.found += 1

    def name(self, server: Server) -> bytes:
        """The name of the last query to a server."""
        data = [sent.data for sent in self.network.sent if sent.server == server][-1]
        query = parse_query(data)
        assert (query.type, query.klass, query.recursion_desired) == (m.TXT, m.IN, True)
        return query.name


def test_server_that_sends_the_query_back_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        case = Case()
        assert case.detector.usable((FIRST, SECOND)) == (FIRST, SECOND)
        await turns()
        names = case.name(FIRST), case.name(SECOND)
        assert len(set(names)) == 2
        assert not case.detector.is_test(m.name("00000000.test"))
        for _ in range(2):
            assert case.detector.is_test(names[0])
        assert case.found == 1, "reported once"
        assert caplog.text.count("192.0.2.1#53") == 1
        assert case.detector.usable((FIRST, SECOND)) == (SECOND,)
        await asyncio.sleep(OPEN_SECONDS)
        assert not case.network.open_udp_connections

    run(scene())


def test_changed_servers_are_all_tested_again() -> None:
    async def scene() -> None:
        case = Case()
        case.detector.usable((FIRST, SECOND))
        await turns()
        old = case.name(FIRST)
        case.detector.is_test(old)
        assert case.detector.usable((FIRST, THIRD)) == (FIRST, THIRD)
        await turns()
        assert not case.detector.is_test(old)
        assert case.detector.is_test(case.name(FIRST))
        assert case.detector.usable((FIRST, THIRD)) == (THIRD,)
        case.detector.close()
        assert not case.network.open_udp_connections

    run(scene())


def test_tests_are_bounded_and_an_unreachable_server_is_left_to_others() -> None:
    async def scene() -> None:
        case = Case()
        servers = tuple(Server(f"192.0.2.{number}") for number in range(MAX_TESTED + 5))
        opened = case.network.open_udp

        def fail_first(server: Server, *rest: object) -> object:
            if server == servers[0]:
                raise OSError(101, "Network is unreachable")
            return opened(server, *rest)  # type: ignore[arg-type]

        case.network.open_udp = fail_first  # type: ignore[method-assign, assignment]
        assert case.detector.usable(servers) == servers
        await turns()
        assert len(case.network.sent) == MAX_TESTED - 1
        case.detector.close()

    run(scene())
