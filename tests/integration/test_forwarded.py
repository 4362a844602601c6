"""Wrong replies of machines behind the node, seen in conntrack's flows: by function probes where the kernel allows
them, by conntrack's events everywhere.

The machines are packets on tun devices; no socket of this machine takes part.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from router import Machine, Router, inhabit
from scene import PATIENCE_SECONDS, ask
from sensors import Watch
from waiting import wait_for

from udpwatch.agent.kernel.ctnetlink import Listener
from udpwatch.agent.kernel.loader import Limits
from udpwatch.agent.model import Cause, Event, Finding, Forwarded, Hooks, Tuple, Verdict
from udpwatch.agent.sources import flow_events, flows
from udpwatch.agent.testing.lab import ContainerHost, Lab

#: by family: client, the server's address that is asked, the one it answers from, another server
V4 = ("10.1.0.9", "10.2.0.5", "10.2.0.6", "10.2.0.7")
V6 = ("fd00:1::9", "fd00:2::5", "fd00:2::6", "fd00:2::7")
both = pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])


@pytest.fixture(autouse=True, scope="module")
def short_grace() -> Iterator[None]:
    """Let a server have half a second to answer a call: the tests' machines answer at once."""
    before, flows.GRACE_SECONDS = flows.GRACE_SECONDS, 0.5
    yield
    flows.GRACE_SECONDS = before


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    with Router() as made:
        yield made


@pytest.fixture(scope="module", params=["probes", "events"])
def how(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def open_watch(how: str) -> Callable[..., Watch]:
    """Open a sensor of the wanted kind; skip the test when the kernel does not allow it."""

    def open_one(limits: Limits = Limits()) -> Watch:
        if how == "events":
            return Watch(limits, hooks=Hooks.CGROUP, forwarded=Forwarded.ON)
        watch = Watch(limits)
        if not watch.sensor.sees_forwarded:
            reason = watch.sensor.forwarded_reason
            watch.close()
            pytest.skip(f"function probes are not allowed here ({reason}): `make test-kernels` boots kernels that do")
        return watch

    return open_one


@pytest.fixture(scope="module")
def sides(open_watch: Callable[..., Watch], router: Router) -> Iterator[Watch]:
    """A sensor that was open before the router's first packet."""
    with closing(open_watch()) as watch:
        assert watch.sensor.listens == (not watch.sensor.probes()[-1].how)
        yield watch


def settled(watch: Watch, port: int) -> dict[Finding, int]:
    """Return the findings once every candidate has been decided."""
    watch.read()
    time.sleep(flows.GRACE_SECONDS + 0.1)  # the grace itself
    return watch.findings(port)


# ---- wrong replies ----


@both
def test_wrong_reply_of_a_machine_behind_the_node_is_found(
    sides: Watch, router: Router, port: int, family: tuple[str, ...]
) -> None:
    client, asked, other, _ = family
    router.ask(client, 4444, asked, port)
    router.answer(other, port, client, 4444)
    ((finding, count),) = settled(sides, port).items()
    assert count == 1
    assert (finding.expected, finding.actual, finding.port) == (asked, other, port)
    assert (finding.verdict, finding.cause) == (Verdict.NEW, Cause.FORWARDED)
    assert (finding.process, finding.interface) == ("", "right")
    (event,) = sides.events(port)
    assert event.request == Tuple(client, 4444, asked, port)
    assert event.original == Tuple(other, port, client, 4444)
    assert event.reply == Tuple(client, 4444, other, port)
    assert (event.peer, event.peer_port, event.pid) == (client, 4444, 0)
    assert event.netns_inode == router.node.inode


@both
def test_wrong_replies_behind_the_node_are_counted_in_flows(
    sides: Watch, router: Router, port: int, family: tuple[str, ...]
) -> None:
    client, asked, other, _ = family
    for client_port in (4444, 4445, 4446):
        router.ask(client, client_port, asked, port)
        for _ in range(5):
            router.answer(other, port, client, client_port)
    ((_, count),) = settled(sides, port).items()
    assert count == 3
    assert sorted(event.count for event in sides.events(port)) == [1, 2, 3]
    router.ask(client, 4447, asked, port)
    router.answer(other, port, client, 4447)
    assert sum(settled(sides, port).values()) == 4


def test_wrong_reply_of_a_server_behind_dnat_is_found(sides: Watch, router: Router, port: int) -> None:
    """The machine received the request at the address after NAT; the client asked the service address."""
    client, asked, other, _ = V4
    router.node.nft(
        f"table ip dnat{port} {{ chain d {{ type nat hook prerouting priority dstnat;"
        f" ip daddr 10.99.0.9 udp dport 7999 dnat to {asked}:{port}; }}; }}"
    )
    router.left.send(client, 4444, "10.99.0.9", 7999)
    assert router.right.receive() == (client, 4444, asked, port)
    router.answer(other, port, client, 4444)
    ((finding, count),) = settled(sides, port).items()
    assert (finding.expected, finding.actual, count) == (asked, other, 1)
    (event,) = sides.events(port)
    assert event.request == Tuple(client, 4444, "10.99.0.9", 7999)
    # and a right answer is translated back, and is no finding
    router.left.send(client, 4445, "10.99.0.9", 7999)
    router.right.receive()
    router.right.send(asked, port, client, 4445)
    assert router.left.receive() == ("10.99.0.9", 7999, client, 4445)
    assert sum(settled(sides, port).values()) == 1


def test_wrong_reply_to_a_client_on_the_node_is_found(sides: Watch, router: Router, port: int) -> None:
    with router.node.socket() as client:
        client.bind(("10.2.0.1", 0))
        client.sendto(b"request", ("10.2.0.5", port))
        source, source_port, _, _ = router.right.receive()
        router.right.send("10.2.0.6", port, source, source_port)
        ((finding, count),) = settled(sides, port).items()
        assert (finding.expected, finding.actual, finding.cause, count) == ("10.2.0.5", "10.2.0.6", Cause.FORWARDED, 1)


def test_wrong_reply_to_a_request_from_before_the_start_is_found(open_watch: Callable[..., Watch], port: int) -> None:
    """Existing entries are read once at the start; answered ones are ignored."""
    patient = Limits(window_ns=600_000_000_000)  # loading takes longer than conntrack waits, under emulation
    with Router() as router:
        router.node.sysctl("net/netfilter/nf_conntrack_udp_timeout", "600")
        client, asked, other, _ = V4
        for client_port in (4444, 4445):
            router.ask(client, client_port, asked, port)
        router.answer(asked, port, client, 4445)
        with closing(open_watch(patient)) as watch:
            router.answer(other, port, client, 4444)
            router.answer(other, port, client, 4445)
            ((finding, count),) = settled(watch, port).items()
            assert (finding.expected, finding.actual, count) == (asked, other, 1)
            (event,) = watch.events(port)
            assert event.request == Tuple(client, 4444, asked, port)


def test_entry_deleted_before_the_decision_is_judged_by_its_last_status(
    sides: Watch, router: Router, port: int
) -> None:
    """When its deletion was not seen, nothing is claimed, and this is counted."""
    client, asked, other, _ = V4
    before = sides.sensor.sample(1 << 62).undecided
    router.ask(client, 4444, asked, port)
    router.answer(other, port, client, 4444)
    sides.read()
    router.node.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", str(port)])
    found = settled(sides, port)
    if sides.sensor.listens:
        assert not found
        assert sides.sensor.sample(1 << 62).undecided == before + 1
    else:
        assert list(found.values()) == [1]


# ---- right replies that look wrong ----


@both
def test_ten_thousand_right_flows_give_no_finding(
    sides: Watch, router: Router, port: int, family: tuple[str, ...]
) -> None:
    client, asked, _, _ = family
    before = sides.sensor.sample(1 << 62).flows
    for number in range(10_000):
        router.ask(client, 20_000 + number, asked, port)
        router.answer(asked, port, client, 20_000 + number)
        if number % 1000 == 0:
            sides.read()
    assert not settled(sides, port)
    assert sides.sensor.sample(1 << 62).flows >= before + 10_000


@both
def test_resolver_that_tries_the_next_server_is_not_a_finding(
    sides: Watch, router: Router, port: int, family: tuple[str, ...]
) -> None:
    """The first DNS server is down, the second responds; from a port for each and from one port for both."""
    client, first, second, third = family
    for number in range(200):
        router.ask(client, 20_000 + number, first, port)
        router.ask(client, 30_000 + number, second, port)
        router.answer(second, port, client, 30_000 + number)
    for number in range(200):
        router.ask(client, 40_000 + number, first, port)
        router.ask(client, 40_000 + number, third, port)
        router.answer(third, port, client, 40_000 + number)
    assert not settled(sides, port)


def test_late_reply_to_a_reused_port_is_not_a_finding(open_watch: Callable[..., Watch], port: int) -> None:
    """The entry of the first request is gone when its reply arrives, and the port has asked another server."""
    client, first, second, _ = V4
    with Router() as router, closing(open_watch()) as watch:
        router.ask(client, 4444, first, port)
        watch.read()
        router.node.run(["conntrack", "-D", "-p", "udp", "--orig-port-dst", str(port)])
        router.ask(client, 4444, second, port)
        router.answer(first, port, client, 4444)
        assert not settled(watch, port)


@both
def test_peers_that_call_each_other_are_not_a_finding(
    sides: Watch, router: Router, port: int, family: tuple[str, ...]
) -> None:
    """DHT, WireGuard and games use one port for everything: some calls stay unanswered, others are answered."""
    peer, _, _, _ = family
    base = peer.rpartition("1:")[0] if ":" in peer else "10.2.1."
    others = [f"fd00:2::{number:x}" if ":" in peer else f"{base}{number}" for number in range(16, 116)]
    for number, other in enumerate(others):
        router.ask(peer, port, other, port)
        if number % 2:
            router.answer(other, port, peer, port)
        stranger = others[(number + 50) % len(others)] + ("1" if ":" in peer else "")
        router.right.send(stranger, port, peer, port)
        router.left.receive()
        if number % 3 == 0:
            router.left.send(peer, port, stranger, port)
            router.right.receive()
    router.right.drain()
    assert not settled(sides, port)


@both
def test_server_that_calls_its_client_is_not_a_finding(
    sides: Watch, router: Router, port: int, family: tuple[str, ...]
) -> None:
    """As in SIP: one proxy is down, the other one calls the same client, which answers."""
    client, down, other, _ = family
    router.ask(client, port, down, port)
    router.answer(other, port, client, port)
    router.ask(client, port, other, port)
    assert not settled(sides, port)


def test_two_clients_behind_one_nat_are_not_a_finding(sides: Watch, router: Router, port: int) -> None:
    """Their NAT gave both the same port, since they ask different servers: the reply could belong to either."""
    nat, first, second, third = V4
    router.ask(nat, 4444, first, port)
    router.ask(nat, 4444, second, port)
    router.answer(third, port, nat, 4444)
    assert not settled(sides, port)


def test_two_clients_behind_the_nodes_nat_are_not_a_finding(sides: Watch, router: Router, port: int) -> None:
    _, first, second, third = V4
    router.node.nft(
        f"table ip nat{port} {{ chain p {{ type nat hook postrouting priority srcnat;"
        f" ip saddr 10.1.0.0/16 udp dport {port} masquerade; }}; }}"
    )
    for client, server in (("10.1.0.9", first), ("10.1.0.10", second)):
        router.left.send(client, 4444, server, port)
        assert router.right.receive() == ("10.2.0.1", 4444, server, port)
    router.right.send(third, port, "10.2.0.1", 4444)
    assert not settled(sides, port)


def test_same_addresses_in_another_zone_are_not_a_finding(sides: Watch, router: Router, port: int) -> None:
    """Two tenants have the same addresses."""
    client, asked, other, _ = V4
    router.node.nft(
        f"table ip zone{port} {{ chain z {{ type filter hook prerouting priority raw;"
        f" iifname left udp dport {port} ct zone set 5; }}; }}"
    )
    router.ask(client, 4444, asked, port)
    router.answer(other, port, client, 4444)
    assert not settled(sides, port)


def test_reply_after_the_window_is_not_a_finding(open_watch: Callable[..., Watch], router: Router, port: int) -> None:
    client, asked, other, _ = V4
    with closing(open_watch(Limits(window_ns=300_000_000))) as watch:
        router.ask(client, 4444, asked, port)
        watch.read()
        time.sleep(0.5)  # the scene itself: time goes by
        router.answer(other, port, client, 4444)
        assert not settled(watch, port)


@pytest.mark.parametrize("group", ["10.1.255.255", "255.255.255.255", "239.1.2.3", "ff15::77"])
def test_reply_to_a_multicast_request_is_not_a_finding(sides: Watch, router: Router, port: int, group: str) -> None:
    client, _, other, _ = V6 if ":" in group else V4
    router.left.send(client, 4444, group, port)
    router.answer(other, port, client, 4444)
    assert not settled(sides, port)


@pytest.mark.parametrize("group", ["10.2.255.255", "255.255.255.255", "224.0.0.251", "ff02::fb"])
@pytest.mark.parametrize("first", ["server", "group"])
def test_reply_to_a_request_to_group_and_server_is_not_a_finding(
    sides: Watch, router: Router, port: int, group: str, first: str
) -> None:
    """Both requests come from one port, as in mDNS (RFC 6762, section 5.4): any responder is right."""
    _, asked, other, _ = V6 if ":" in group else V4
    here, family = ("fd00:2::1", socket.AF_INET6) if ":" in group else ("10.2.0.1", socket.AF_INET)
    with router.node.socket(family) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"right")
        client.bind((here, 0))
        for server in (asked, group) if first == "server" else (group, asked):
            client.sendto(b"request", (server, port))
            source, source_port, _, _ = router.right.receive()
        router.right.send(other, port, source, source_port)
        assert not settled(sides, port)


def test_older_of_two_flows_from_before_the_start_is_the_request(open_watch: Callable[..., Watch], port: int) -> None:
    """Each went one way and neither was answered; the agent sees both at once."""
    client, asked, other, _ = V4
    patient = Limits(window_ns=600_000_000_000)  # loading takes longer than conntrack waits, under emulation
    with Router() as router:
        router.node.sysctl("net/netfilter/nf_conntrack_udp_timeout", "600")
        router.answer(other, port, client, 4444)
        time.sleep(1.2)  # the scene itself: conntrack tells ages in seconds
        router.ask(client, 4444, asked, port)
        with closing(open_watch(patient)) as watch:
            assert not settled(watch, port)


# ---- each wrong reply is counted once ----


def test_wrong_reply_of_a_pods_socket_is_counted_once(open_watch: Callable[..., Watch], port: int) -> None:
    """It passes the node's conntrack, too."""
    with ContainerHost() as host, ExitStack() as stack:
        inhabit(host.node)
        watch = stack.enter_context(closing(open_watch()))
        host.container.ip("addr add 172.17.0.4/16 dev eth0")
        with host.container.socket() as server, host.outside.socket() as client:
            server.bind(("0.0.0.0", port))
            host.outside.ip(f"route add 172.17.0.0/16 via {host.ETH0}")
            server.sendto(*ask(client, "172.17.0.4", port, server))
            ((finding, count),) = settled(watch, port).items()
            assert (finding.expected, finding.actual) == ("172.17.0.4", host.CONTAINER)
            assert (finding.cause, count) == (Cause.KERNEL_CHOSEN, 1)
            assert len(watch.events(port)) == 1


def test_wrong_reply_of_a_socket_on_the_node_is_counted_once(open_watch: Callable[..., Watch], port: int) -> None:
    with ContainerHost() as host, ExitStack() as stack:
        inhabit(host.node)
        watch = stack.enter_context(closing(open_watch()))
        with host.node.socket() as server, host.container.socket() as client:
            server.bind(("0.0.0.0", port))
            server.sendto(*ask(client, host.ETH0, port, server))
            ((finding, count),) = settled(watch, port).items()
            assert (finding.cause, count) == (Cause.KERNEL_CHOSEN, 1)


def test_wrong_reply_through_two_namespaces_is_counted_once(open_watch: Callable[..., Watch], port: int) -> None:
    """The client's own namespace has conntrack, too."""
    with ContainerHost() as host, ExitStack() as stack:
        inhabit(host.node)
        inhabit(host.outside)
        host.outside.nft("table inet t { chain i { type filter hook input priority 0; ct state invalid drop; }; }")
        watch = stack.enter_context(closing(open_watch()))
        with host.node.entered():
            machine = stack.enter_context(closing(Machine("behind")))
        host.node.ip("addr add 10.8.0.1/24 dev behind", "link set behind up")
        with host.outside.socket() as client:
            client.sendto(b"request", ("10.8.0.2", port))
            source, source_port, _, _ = machine.receive()
            machine.send("10.8.0.3", port, source, source_port)
            client.settimeout(PATIENCE_SECONDS)
            assert client.recvfrom(100)[1] == ("10.8.0.3", port)
            ((finding, count),) = settled(watch, port).items()
            assert (finding.expected, finding.actual, count) == ("10.8.0.2", "10.8.0.3", 1)


def test_many_wrong_replies_of_a_pod_are_counted_once(open_watch: Callable[..., Watch], port: int) -> None:
    """They are more than the map of reported replies holds, each to another port of the client."""
    with ContainerHost() as host, ExitStack() as stack:
        inhabit(host.node)
        watch = stack.enter_context(closing(open_watch(Limits(max_reported=1024))))
        host.container.ip("addr add 172.17.0.4/16 dev eth0")
        host.outside.ip(f"route add 172.17.0.0/16 via {host.ETH0}")
        with host.container.socket() as server:
            server.bind(("0.0.0.0", port))
            for number in range(3000):
                with host.outside.socket() as client:
                    server.sendto(*ask(client, "172.17.0.4", port, server))
                if number % 200 == 0:
                    watch.read()
        found = settled(watch, port)
        assert {finding.cause for finding in found} == {Cause.KERNEL_CHOSEN}
        assert sum(found.values()) == 3000


@pytest.fixture
def crowded(open_watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Router]]:
    """A sensor whose table holds 256 clients, and a router without a flow."""
    monkeypatch.setattr(flow_events, "MAX_REQUESTS", 256)
    with Router() as router, closing(open_watch(Limits(max_peers=1024))) as watch:
        yield watch, router


def undecided(watch: Watch) -> int:
    sample = watch.sensor.sample(1 << 62)
    return sample.undecided + sample.counters.undecided


def test_flood_through_the_router_evicts_its_own_requests(crowded: tuple[Watch, Router], port: int) -> None:
    """Requests to one port fill the table; requests to another port stay, and their wrong replies are found."""
    watch, router = crowded
    client, asked, other, _ = V4
    for number in range(8):
        router.ask(client, 4444 + number, asked, port)
    before = watch.sensor.sample(1 << 62).evicted_peers
    for number in range(1000):
        router.ask(client, 20_000 + number, asked, port + 1)
    assert watch.sensor.sample(1 << 62).evicted_peers - before >= 1000 - 256
    for number in range(8):
        router.answer(other, port, client, 4444 + number)
    assert sum(settled(watch, port).values()) == 8


def test_reply_to_an_evicted_request_is_undecided(crowded: tuple[Watch, Router], port: int) -> None:
    """Right or wrong, it is counted and is no finding; later requests of the client do not change that."""
    watch, router = crowded
    client, asked, other, third = V4
    router.ask(client, 4444, asked, port)
    router.ask(client, 4445, asked, port)
    for number in range(1000):
        router.ask(client, 20_000 + number, asked, port)
    watch.read()
    router.node.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", "4444"])
    router.node.run(["conntrack", "-D", "-p", "udp", "--orig-port-src", "4445"])
    before = undecided(watch)
    router.answer(other, port, client, 4444)
    router.ask(client, 4445, third, port)
    router.answer(asked, port, client, 4445)  # late, and right
    assert not settled(watch, port)
    assert undecided(watch) - before == 2


# ---- conntrack's events ----


@pytest.mark.parametrize("wrong", [0, 400])
def test_lost_conntrack_events_are_counted_and_recovered_from_the_table(
    router: Router, port: int, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """A small buffer, and more new flows than it holds: counted, then read from the table, then right again. Events
    that the buffer still held are in the table as well.
    """
    monkeypatch.setattr(flow_events, "RECEIVE_BYTES", 8192)
    client, asked, other, _ = V4
    with closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.ON)) as watch:
        for number in range(500):
            router.ask(client, 20_000 + number, asked, port)
            router.answer(other if number == wrong else asked, port, client, 20_000 + number)
        wait_for(lambda: watch.count(port), "the table to be read")
        ((finding, count),) = settled(watch, port).items()
        assert (finding.actual, count) == (other, 1)
        overruns = watch.sensor.sample(1 << 62).overruns
        assert overruns >= 1
        router.ask(client, 4444, asked, port)
        router.answer(other, port, client, 4444)
        assert sum(settled(watch, port).values()) == 2
        assert watch.sensor.sample(1 << 62).overruns == overruns


def test_conntrack_events_of_other_protocols_are_filtered(router: Router, port: int) -> None:
    """The socket filter keeps them out of the buffer."""
    with router.node.entered():
        listener = Listener(1 << 20)
    with closing(listener), router.node.socket(kind=socket.SOCK_STREAM) as stream:
        stream.setblocking(False)
        stream.connect_ex(("10.2.0.5", port))
        with socket.socket(fileno=socket.dup(listener.fileno())) as raw:
            with pytest.raises(BlockingIOError):
                raw.recv(100)
        router.ask(V4[0], 4444, V4[1], port)
        (entry,) = listener.read()
        assert entry.original == Tuple(V4[0], 4444, V4[1], port)


def test_namespace_created_later_is_watched(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_events, "LOOK_SECONDS", 0.0)
    client, asked, other, _ = V4
    with closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.ON)) as watch:
        with Router() as router:
            watch.read()
            router.ask(client, 4444, asked, port)
            router.answer(other, port, client, 4444)
            assert list(settled(watch, port).values()) == [1]
            (event,) = watch.events(port)
            assert isinstance(event, Event)
        watch.read()
        listened = len(watch.sensor._flows._source._namespaces)  # type: ignore[union-attr]
        watch.read()
        assert len(watch.sensor._flows._source._namespaces) <= listened  # type: ignore[union-attr]


def test_namespace_with_events_turned_off_is_reported_as_unwatched(router: Router) -> None:
    inhabit(router.node)
    router.node.sysctl("net/netfilter/nf_conntrack_events", "0")
    try:
        with closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.ON)) as watch:
            (said,) = watch.sensor.unwatched
            assert said == "net.netfilter.nf_conntrack_events is 0 in 1 network namespaces"
    finally:
        router.node.sysctl("net/netfilter/nf_conntrack_events", "1")


def test_unwatched_namespaces_are_watched_when_descriptors_are_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched namespaces stay watched; the others are reported, and watched once descriptors are free."""
    monkeypatch.setattr(flow_events, "LOOK_SECONDS", 0.0)
    with ExitStack() as stack:
        watch = stack.enter_context(closing(Watch(hooks=Hooks.CGROUP, forwarded=Forwarded.ON)))
        lab = stack.enter_context(Lab())
        for number in range(3):
            inhabit(lab.namespace(f"later-{number}"))
        known = set(watch.sensor._flows._source._namespaces)  # type: ignore[union-attr]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 3, hard))
        try:
            watch.read()
            assert known <= set(watch.sensor._flows._source._namespaces)  # type: ignore[union-attr]
            (said,) = watch.sensor.unwatched
            assert "network namespaces: Too many open files" in said
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        watch.read()
        assert watch.sensor.unwatched == ()
        assert len(set(watch.sensor._flows._source._namespaces) - known) >= 3  # type: ignore[union-attr]


# ---- limits ----


@both
def test_wrong_reply_that_the_nodes_firewall_drops_is_missed(
    sides: Watch, router: Router, port: int, family: tuple[str, ...]
) -> None:
    """By design: a wrong reply is a new flow, and conntrack never confirms what a rule drops."""
    client, asked, other, _ = family
    router.node.nft(
        f"table inet wall{port} {{ chain f {{ type filter hook forward priority 1;"
        f" iifname right udp sport {port} ct state new drop; }}; }}"
    )
    for client_port in (4444, 4445):
        router.ask(client, client_port, asked, port)
    router.right.send(other, port, client, 4444)
    router.answer(asked, port, client, 4445)  # comes out, so the one before it has been dropped by now
    assert not settled(sides, port)
    router.node.nft(f"delete table inet wall{port}")
    router.answer(other, port, client, 4444)
    ((finding, count),) = settled(sides, port).items()
    assert (finding.expected, finding.actual, count) == (asked, other, 1)
