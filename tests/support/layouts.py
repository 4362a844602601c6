"""Nodes with several addresses, and the networks around them: what audit has to judge."""

from __future__ import annotations

from collections.abc import Callable

from audited import Kind, Layout
from scene import SECOND, SECOND_6, VIP, VIP_6

from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace


def docker(lab: ContainerHost) -> Layout:
    """A container behind docker0, a second address, VIPs on loopback. The LAN does not use the node as its router."""
    lab.node.add_addresses("eth0", SECOND, SECOND_6)
    lab.node.ip(f"addr add {VIP}/32 dev lo", f"addr add {VIP_6}/128 dev lo nodad")
    lab.outside.ip("route del default", "route del ::/0")
    lab.outside.ip(f"route add {VIP} via {lab.ETH0}", f"route add {VIP_6} via {lab.ETH0_6}")
    lab.node.nft("flush ruleset")
    return Layout(lab, lab.node, (lab.container, lab.outside))


def pod(lab: ContainerHost) -> Layout:
    """The container: one address of each family."""
    return Layout(lab, lab.container, (lab.node, lab.outside))


def _router(lab: Lab, node: Namespace, *networks: str) -> Namespace:
    """Add a router with a bridge for each network, 10.N.0.1 and fd00:N::1, to which the node's ethI is connected."""
    router = lab.namespace("router")
    for index, number in enumerate(networks):
        bridge = f"lan{number}"
        router.ip(f"link add {bridge} type bridge forward_delay 0", f"link set {bridge} up")
        lab.link(node, f"eth{index}", router, f"node{index}")
        router.ip(
            f"link set node{index} master {bridge}",
            f"addr add 10.{number}.0.1/24 dev {bridge}",
            f"addr add fd00:{number}::1/64 dev {bridge} nodad",
        )
    router.sysctl("net/ipv4/ip_forward", "1")
    router.sysctl("net/ipv6/conf/all/forwarding", "1")
    return router


def _on_lan(lab: Lab, router: Namespace, number: str) -> Namespace:
    """Add a host, 10.N.0.9 and fd00:N::9, whose router is the router."""
    host = lab.namespace(f"lan{number}")
    lab.link(host, "eth0", router, f"host{number}")
    router.ip(f"link set host{number} master lan{number}")
    host.ip(
        f"addr add 10.{number}.0.9/24 dev eth0",
        f"addr add fd00:{number}::9/64 dev eth0 nodad",
        f"route add default via 10.{number}.0.1",
        f"route add ::/0 via fd00:{number}::1",
    )
    return host


def _afar(lab: Lab, router: Namespace, name: str, address: str, address6: str) -> Namespace:
    """Add a host behind the router."""
    host = lab.namespace(name)
    lab.link(host, "eth0", router, name)
    host.ip(
        f"addr add {address}/32 dev eth0",
        f"addr add {address6}/128 dev eth0 nodad",
        "addr add fe80::2/64 dev eth0 nodad",
        "route add default dev eth0",
        "route add ::/0 via fe80::1 dev eth0",
    )
    router.ip(
        f"addr add fe80::1/64 dev {name} nodad",
        f"route add {address} dev {name}",
        f"route add {address6} via fe80::2 dev {name}",
    )
    router.sysctl(f"net/ipv4/conf/{name}/proxy_arp", "1")
    router.sysctl(f"net/ipv4/neigh/{name}/proxy_delay", "0")
    return host


def _addresses(node: Namespace, index: int, number: str) -> None:
    node.ip(f"addr add 10.{number}.0.5/24 dev eth{index}", f"addr add fd00:{number}::5/64 dev eth{index} nodad")


def two_uplinks(lab: Lab) -> Layout:
    """Two networks with a router each, and policy routing that is right for programs that set their source."""
    node = lab.namespace("node")
    router = _router(lab, node, "1", "2")
    for index, number in enumerate("12"):
        _addresses(node, index, number)
    node.ip(
        "route add default via 10.1.0.1",
        "route add ::/0 via fd00:1::1",
        "route add default via 10.2.0.1 table 100",
        "rule add from 10.2.0.5 lookup 100",
        "route add ::/0 via fd00:2::1 table 100",
    )
    node.run(["ip", "-6", "rule", "add", "from", "fd00:2::5", "lookup", "100"])
    hosts = [_on_lan(lab, router, number) for number in "12"]
    return Layout(lab, node, (*hosts, _afar(lab, router, "afar", "192.168.77.7", "fd00:77::7")))


def keepalived(lab: Lab) -> Layout:
    """A VIP as keepalived adds it: /32, and in IPv6 /128 that is not preferred as a source."""
    node = lab.namespace("node")
    router = _router(lab, node, "1")
    _addresses(node, 0, "1")
    node.ip(
        "addr add 10.1.0.100/32 dev eth0",
        "addr add fd00:1::100/128 dev eth0 nodad preferred_lft 0",
        "route add default via 10.1.0.1",
        "route add ::/0 via fd00:1::1",
    )
    return Layout(lab, node, (_on_lan(lab, router, "1"), _afar(lab, router, "afar", "192.0.2.7", "2001:db8:7::7")))


def secondary(lab: Lab) -> Layout:
    """More addresses of one network, another network on the same link, and a second loopback address."""
    node = lab.namespace("node")
    router = _router(lab, node, "1")
    _addresses(node, 0, "1")
    node.ip(
        "addr add 10.1.0.6/24 dev eth0",
        "addr add 10.3.0.5/24 dev eth0",
        "addr add 127.0.0.2/8 dev lo",
        "route add default via 10.1.0.1",
        "route add ::/0 via fd00:1::1",
    )
    router.ip("addr add 10.3.0.1/24 dev lan1")
    return Layout(lab, node, (_on_lan(lab, router, "1"), _afar(lab, router, "afar", "192.168.77.7", "fd00:77::7")))


def calico(lab: Lab) -> Layout:
    """Pods behind links without addresses; routing chooses the address of another interface."""
    node = lab.namespace("node")
    router = _router(lab, node, "1")
    container = lab.namespace("container")
    node.ip("link add docker0 type bridge forward_delay 0", "link set docker0 up", "addr add 172.17.0.1/16 dev docker0")
    lab.link(node, "veth0", container, "eth0")
    node.ip("link set veth0 master docker0")
    container.ip("addr add 172.17.0.3/16 dev eth0", "route add default via 172.17.0.1")
    _addresses(node, 0, "1")
    node.ip("route add default via 10.1.0.1", "route add ::/0 via fd00:1::1")
    pod = lab.namespace("pod")
    lab.link(node, "cali1", pod, "eth0")
    node.ip(
        "route add 10.244.1.5 dev cali1 scope link",
        "addr add fe80::1/64 dev cali1 nodad",
        "route add fd00:244::5 dev cali1",
    )
    node.sysctl("net/ipv4/conf/cali1/proxy_arp", "1")
    node.sysctl("net/ipv4/neigh/cali1/proxy_delay", "0")
    node.sysctl("net/ipv4/ip_forward", "1")
    pod.ip(
        "addr add 10.244.1.5/32 dev eth0",
        "addr add fd00:244::5/128 dev eth0 nodad",
        "route add 169.254.1.1 dev eth0",
        "route add default via 169.254.1.1",
        "route add ::/0 via fe80::1 dev eth0",
    )
    return Layout(lab, node, (pod, container, _on_lan(lab, router, "1")))


def any_ip(lab: Lab) -> Layout:
    """A load balancer that takes whole networks without having their addresses, and tables for marked packets only."""
    node = lab.namespace("node")
    router = _router(lab, node, "1")
    _addresses(node, 0, "1")
    node.ip(
        "route add default via 10.1.0.1",
        "route add ::/0 via fd00:1::1",
        "route add local 10.9.0.0/24 dev lo",
        "route add local fd00:9::/64 dev lo",
        "route add local 10.9.1.7/32 dev lo",
        "route add local 0.0.0.0/0 dev lo table 2004",
        "rule add fwmark 0x200 lookup 2004",
    )
    router.ip(
        "route add 10.9.0.0/24 via 10.1.0.5",
        "route add 10.9.1.7 via 10.1.0.5",
        "route add fd00:9::/64 via fd00:1::5",
    )
    return Layout(lab, node, (_on_lan(lab, router, "1"), _afar(lab, router, "afar", "192.168.77.7", "fd00:77::7")))


def two_prefixes(lab: Lab) -> Layout:
    """Two public IPv6 prefixes on one link: the kernel selects the source that is closest to the peer."""
    node = lab.namespace("node")
    router = _router(lab, node, "1")
    node.ip(
        "addr add 10.1.0.5/24 dev eth0",
        "addr add 2001:db8:1::5/64 dev eth0 nodad",
        "addr add 2001:db8:2::5/64 dev eth0 nodad",
        "route add default via 10.1.0.1",
        "addr add fe80::5/64 dev eth0 nodad",
        "route add ::/0 via 2001:db8:1::1",
    )
    router.ip("addr add 2001:db8:1::1/64 dev lan1 nodad", "addr add 2001:db8:2::1/64 dev lan1 nodad")
    far = (
        _afar(lab, router, "afar1", "192.0.2.7", "2001:db8:1:f::1"),
        _afar(lab, router, "afar2", "192.0.2.8", "2001:db8:2:f::1"),
        _afar(lab, router, "afar3", "192.0.2.9", "2600::1"),
    )
    return Layout(lab, node, far)


def vrf(lab: Lab) -> Layout:
    """One network in a VRF; servers that are bound to an interface or to the VRF."""
    node = lab.namespace("node")
    router = _router(lab, node, "1", "2")
    node.ip(
        "link add red type vrf table 10",
        "link set red up",
        "link set eth1 master red",
        "addr add 10.2.0.6/32 dev red",
        "addr add fd00:2::6/128 dev red nodad",
    )
    for index, number in enumerate("12"):
        _addresses(node, index, number)
    node.ip("route add default via 10.1.0.1", "route add ::/0 via fd00:1::1", "route add default via 10.2.0.1 vrf red")
    kinds = [
        Kind(f"{device or 'no device'}, family {family}", family, address, device=device)
        for device in ("", "eth0", "red")
        for family, address in ((4, "0.0.0.0"), (6, "::"))
    ]
    return Layout(lab, node, (_on_lan(lab, router, "1"), _on_lan(lab, router, "2")), kinds)


def tunnel(lab: Lab) -> Layout:
    """A VPN server: a point-to-point network beside the LAN."""
    node = lab.namespace("node")
    router = _router(lab, node, "1")
    _addresses(node, 0, "1")
    node.ip("route add default via 10.1.0.1", "route add ::/0 via fd00:1::1")
    peer = lab.namespace("peer")
    lab.link(node, "tun0", peer, "eth0")
    node.ip("addr add 10.8.0.1/24 dev tun0", "addr add fd00:8::1/64 dev tun0 nodad")
    peer.ip(
        "addr add 10.8.0.2/24 dev eth0",
        "addr add fd00:8::2/64 dev eth0 nodad",
        "route add 10.1.0.0/24 via 10.8.0.1",
        "route add fd00:1::/64 via fd00:8::1",
    )
    return Layout(lab, node, (peer, _on_lan(lab, router, "1")))


LAYOUTS: dict[str, tuple[type[Lab], Callable[..., Layout]]] = {
    "docker": (ContainerHost, docker),
    "pod": (ContainerHost, pod),
    **{
        make.__name__: (Lab, make)
        for make in (two_uplinks, keepalived, secondary, calico, any_ip, two_prefixes, vrf, tunnel)
    },
}
