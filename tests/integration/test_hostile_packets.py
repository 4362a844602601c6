"""Mutated packets at a high rate towards a right and a wrong server: both are counted exactly."""

from __future__ import annotations

import secrets
import socket
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import dpkt
from agents import Agent
from hostile_packets import Packets, deep_packet, request_packets
from scene import V4, V6, Family, picked_source
from tun import Tun
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace
from udpwatch.agent.testing.servers import enable_pktinfo, reply_control

SEEDS = [19, secrets.randbits(32)]
PACKETS = 5_000  # of each seed
REQUESTS = 100  # of each family to each server
DEEP = 20
ADDRESSES = {4: ("10.9.0.1", "10.9.0.2"), 6: ("fd09::1", "fd09::2")}
CLIENT = {4: "10.9.0.9", 6: "fd09::9"}
#: not the clients: a request that a client also sends to the other address would make that source right
ATTACKERS = ("10.9.0.66", "192.0.2.66", "fd09::66", "2001:db8::66", "127.0.0.1", "::1", "0.0.0.0", "::")
TARGETS = ("10.9.0.255", "255.255.255.255", "224.0.0.1", "ff02::1", "127.0.0.1", "::1")
MARK = b"a question"
SO_RCVBUFFORCE = 33


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def serve(namespace: Namespace, name: str, family: Family, port: int, right: bool) -> None:
    """Start a server that replies to what begins with MARK."""
    server = namespace.socket(family.inet)
    server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    if family is V6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if right:
        enable_pktinfo(server)
    server.bind((family.wildcard, port))

    def run() -> None:
        while True:
            data, control, _flags, peer = server.recvmsg(65535, 100)
            if not data.startswith(MARK):
                continue
            level, kind, asked = control[0] if control else (0, 0, b"")
            server.sendmsg([data], [(level, kind, reply_control(asked))] if right else [], 0, peer)

    namespace.spawn(name, run)
    server.close()


def replies(tun: Tun) -> Iterator[tuple[bytes, int, int]]:
    """Yield (source, its port, the client's port) of each reply that has left."""
    for packet in tun.read():
        is_ipv6 = packet[0] >> 4 == 6
        if packet[6 if is_ipv6 else 9] != dpkt.ip.IP_PROTO_UDP:  # ICMP, also about packets that dpkt fails on
            continue
        ip = (dpkt.ip6.IP6 if is_ipv6 else dpkt.ip.IP)(packet)
        if ip.data.data.startswith(MARK):
            yield ip.src, ip.data.sport, ip.data.dport


def test_servers_are_counted_exactly_beside_hostile_packets(folder: Path, port: int) -> None:
    right, wrong = port, port + 1_000
    with Lab() as lab, Agent(folder) as agent:
        node = lab.namespace("node")
        with Tun(node, "tun0") as tun:
            for addresses in ADDRESSES.values():
                node.add_addresses("tun0", *addresses)
            node.ip("route add default dev tun0", "route add ::/0 dev tun0")
            for family in (V4, V6):
                serve(node, "right-server", family, right, True)
                serve(node, "wrong-server", family, wrong, False)
            asked = {}
            for family in (V4, V6):
                chosen = picked_source(node, family, CLIENT[family.number])
                asked[family.number] = next(each for each in ADDRESSES[family.number] if each != chosen)
            sent, left = Counter[int](), Counter[tuple[bytes, int]]()

            def ask(turn: int) -> None:
                for number, address in asked.items():
                    for server in (right, wrong):
                        source, ports = packed(CLIENT[number]), (10_000 + turn, server)
                        for packet in request_packets(source, packed(address), ports, MARK, turn):
                            assert tun.write(packet)
                        sent[server] += 1

            def answered() -> bool:
                left.update((source, port) for source, port, _ in replies(tun))
                return sum(left.values()) == sum(sent.values())

            sources = [packed(each) for each in ATTACKERS]
            targets = [packed(each) for each in (*ADDRESSES[4], *ADDRESSES[6], *TARGETS)]
            for seed in SEEDS:
                print(f"seed {seed}")
                packets = Packets(seed, sources, targets, (right, wrong))
                for turn in range(REQUESTS // len(SEEDS)):
                    for _ in range(PACKETS * len(SEEDS) // REQUESTS):
                        tun.write(packets.packet())
                    ask(REQUESTS * SEEDS.index(seed) + turn)
                    wait_for(answered, f"replies beside hostile packets of seed {seed}")
            assert sent[right] == sent[wrong] == 2 * REQUESTS
            for address in asked.values():
                assert left[packed(address), right] == REQUESTS
                assert left[packed(address), wrong] == 0
            assert agent.counted(wrong, sent[wrong]) == sent[wrong]
            found = agent.samples("udpwatch_reply_source_mismatch_total")
            assert {each.labels["expected"] for each in found if each.labels["port"] == str(wrong)} == {*asked.values()}
            assert agent.wrong(right) == 0
            requests = partial(agent.metric, "udpwatch_server_requests_total", port=str(right))
            wait_for(lambda: requests() >= sent[right], "the requests")  # the agent lists a server after some seconds
            before = agent.metric("udpwatch_events_lost_total", stage="unparsed")
            print(f"{requests():.0f} requests to the right server, {before:.0f} packets unparsed")
            for each in range(DEEP):
                addresses, ports = (packed(CLIENT[6]), packed(ADDRESSES[6][0])), (9_000, right)
                assert tun.write(deep_packet(*addresses, ports, b"deep", 33 + each % 8))
            unparsed = before + DEEP
            wait_for(lambda: agent.metric("udpwatch_events_lost_total", stage="unparsed") >= unparsed, "the count")
            assert agent.metric("udpwatch_events_lost_total", stage="unparsed") == unparsed
            assert agent.get("/readyz")[0] == 200
            assert [line for line in agent.log if "Traceback" in line] == []
