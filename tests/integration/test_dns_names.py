"""Options about names, beside dnsmasq with the same options and files."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from dns_server import FakeServer, Responder, ask, rcode, texts, write
from dnsmasq import dnsmasq
from waiting import wait_for

from udpwatch.agent.testing.lab import Lab, Namespace


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that dnsmasq can read: it gives up root."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@contextlib.contextmanager
def both(*options: str, setup: Callable[[Namespace], None] = lambda node: None) -> Iterator[list[Namespace]]:
    """Two namespaces alike: one with udpwatch, one with dnsmasq."""
    with Lab() as built:
        ours, theirs = built.namespace("ours"), built.namespace("theirs")
        for node in (ours, theirs):
            setup(node)
        with Responder(ours, *options), dnsmasq(theirs, "--no-round-robin", *options):
            yield [ours, theirs]


def found(
    node: Namespace, name: str, kind: str = "A", address: str = "127.0.0.1", tcp: bool = False
) -> tuple[str, list[str]]:
    """Code and data of a response."""
    response = ask(node, address, name, kind, tcp)
    return rcode(response), texts(response)


def test_international_names(folder: Path) -> None:
    hosts = write(folder / "hosts", "192.0.2.1 Bücher.example fine.example i♥ny.example straße.example b_ü.example")
    options = ("--host-record=höst.example,192.0.2.2", "--cname=älias.example,höst.example", "--local=/example/")
    with both(f"--addn-hosts={hosts}", "--address=/wïld.example/192.0.2.3", *options) as nodes:
        for name, addresses in {
            "xn--bcher-kva.example": ["192.0.2.1"],
            "xn--strae-oqa.example": ["192.0.2.1"],
            "xn--b_-yka.example": ["192.0.2.1"],
            "fine.example": ["192.0.2.1"],
            "xn--hst-sna.example": ["192.0.2.2"],
            "xn--lias-koa.example": ["192.0.2.2", "xn--hst-sna.example."],
            "x.xn--wld-zma.example": ["192.0.2.3"],
        }.items():
            assert [found(node, name) for node in nodes] == [("NOERROR", addresses)] * 2, name
        assert [found(node, "xn--iny-zx5a.example") for node in nodes] == [("NXDOMAIN", [])] * 2
        pointers = [found(node, "2.2.0.192.in-addr.arpa", "PTR") for node in nodes]
        assert pointers == [("NOERROR", ["xn--hst-sna.example."])] * 2


def networks(node: Namespace) -> None:
    """Two interfaces, with IPv4 and IPv6, and a label."""
    node.ip("link add br1 type bridge", "link set br1 addrgenmode none", "link set br1 up")
    node.ip("addr add 10.61.0.1/24 dev br1", "addr add 10.61.1.1/25 dev br1", "addr add fd61::1/64 dev br1 nodad")
    node.ip("addr add fd65::5/64 dev br1 nodad preferred_lft 0", "addr add 10.61.2.1/24 dev br1 label br1:1")
    node.ip(
        "link add br2 type bridge", "link set br2 addrgenmode none", "link set br2 up", "addr add 10.62.0.1/24 dev br2"
    )


def pointer(address: str) -> str:
    return ip_address(address).reverse_pointer


INTERFACE_NAMES = (
    *("--interface-name=every.test,br1", "--interface-name=four.test,br1/4", "--interface-name=six.test,br1/6"),
    *("--interface-name=every.test,br2", "--interface-name=label.test,br1:1", "--interface-name=none.test,br9"),
    *("--dynamic-host=eight.test,0.0.0.8,::8,br1", "--dynamic-host=six.only.test,fd00::a:0:0:9,br1"),
    *(
        "--cname=alias.test,every.test",
        "--ptr-record=1.0.62.10.in-addr.arpa,other.test",
        "--host-record=every.test,192.0.2.1",
    ),
)


def test_names_of_interfaces() -> None:
    with both(*INTERFACE_NAMES, "--local=/test/", setup=networks) as nodes:
        for name, kind, data in (
            ("every.test", "A", ["10.61.0.1", "10.61.1.1", "10.62.0.1"]),
            ("every.test", "AAAA", ["fd61::1"]),  # not the deprecated one
            ("four.test", "A", ["10.61.0.1", "10.61.1.1"]),
            ("four.test", "AAAA", []),
            ("six.test", "AAAA", ["fd61::1"]),
            ("label.test", "A", ["10.61.2.1"]),
            ("none.test", "A", []),
            ("eight.test", "A", ["10.61.0.8", "10.61.1.8"]),
            ("eight.test", "AAAA", ["fd61::8"]),
            ("six.only.test", "A", []),
            ("six.only.test", "AAAA", ["fd61::a:0:0:9"]),
            ("only.test", "A", []),
            ("alias.test", "A", ["10.61.0.1", "10.61.1.1", "10.62.0.1", "every.test."]),
            (pointer("10.61.0.1"), "PTR", ["every.test."]),
            (pointer("fd65::5"), "PTR", ["every.test."]),
            (pointer("10.62.0.1"), "PTR", ["every.test."]),
            (pointer("10.61.1.8"), "PTR", ["eight.test."]),
            (pointer("10.61.2.1"), "PTR", ["label.test."]),
        ):
            assert [found(node, name, kind) for node in nodes] == [("NOERROR", data)] * 2, (name, kind)


def test_names_follow_the_addresses_of_their_interfaces() -> None:
    with both(*INTERFACE_NAMES, setup=networks) as nodes:
        assert [found(node, "label.test") for node in nodes] == [("NOERROR", ["10.61.2.1"])] * 2
        for node in nodes:
            node.ip("addr del 10.61.2.1/24 dev br1", "addr add 10.61.3.1/24 dev br1 label br1:1")
            node.ip("addr add 10.62.7.1/24 dev br2", "link add br9 type bridge", "addr add 10.69.0.1/24 dev br9")
            wait_for(lambda node=node: found(node, "label.test")[1] == ["10.61.3.1"], "the new address")
            wait_for(lambda node=node: found(node, "none.test")[1] == ["10.69.0.1"], "the new interface")
            assert "10.62.7.1" in found(node, "every.test")[1]
            assert found(node, pointer("10.61.3.1"), "PTR")[1] == ["label.test."]
            node.ip("link del br9")
            wait_for(lambda node=node: found(node, "none.test")[1] == [], "it to disappear")


@pytest.mark.parametrize("tcp", [False, True])
def test_localised_responses(folder: Path, tcp: bool) -> None:
    """They depend on the address that was asked, whatever was asked before."""
    near, far, other = "10.61.0.50", "10.62.0.50", "192.0.2.1"
    hosts = write(folder / "hosts", *(f"{each} many.test" for each in (near, far, other)), f"{far} one.test")
    options = (
        f"--addn-hosts={hosts}",
        "--interface-name=own.test,br1",
        "--interface-name=own.test,br2",
        "--localise-queries",
    )
    more = ("--cname=alias.test,many.test", f"--host-record=host.test,{near}", f"--host-record=host.test,{far}")
    wild = (f"--address=/wild.test/{near}", f"--address=/wild.test/{far}")
    cases = {
        "many.test": {
            "10.61.0.1": [near],
            "10.62.0.1": [far],
            "10.61.1.1": [near, far, other],
            "fd61::1": [near, far, other],
        },
        "one.test": {"10.61.0.1": [far], "10.62.0.1": [far]},
        "own.test": {
            "10.61.0.1": ["10.61.0.1"],
            "10.62.0.1": ["10.62.0.1"],
            "fd61::1": ["10.61.0.1", "10.61.1.1", "10.62.0.1"],
        },
        "alias.test": {"10.61.0.1": [near, "many.test."], "10.62.0.1": [far, "many.test."]},
        "host.test": {"10.61.0.1": [near], "10.62.0.1": [far], "127.0.0.1": [near, far]},
        "wild.test": {"10.61.0.1": [near, far], "10.62.0.1": [near, far]},
    }
    with both(*options, *more, *wild, setup=networks) as nodes:
        for _ in range(2):
            for name, expected in cases.items():
                for address, data in expected.items():
                    responses = [found(node, name, "A", address, tcp) for node in nodes]
                    assert responses == [("NOERROR", data)] * 2, (name, address)


def test_synthetic_names(folder: Path) -> None:
    hosts = write(folder / "hosts", "192.0.2.77 real.test", "192.0.2.200 h-192-0-2-78.test")
    options = ("--synth-domain=test,192.0.2.0/24,h-", "--synth-domain=six.test,2001:db8::/64,h-", "--local=/test/")
    numbers = ("--synth-domain=n.test,198.51.100.10,198.51.100.19,n*", "--synth-domain=n.test,fd00::/64,s-*")
    more = (
        "--synth-domain=bare.test,::/64",
        "--cname=alias.test,h-192-0-2-1.test",
        "--mx-host=h-192-0-2-1.test,mail.test",
    )
    with both(f"--addn-hosts={hosts}", *options, *numbers, *more) as nodes:
        for name, kind, code, data in (
            ("h-192-0-2-1.test", "A", "NOERROR", ["192.0.2.1"]),
            ("H-192-0-2-1.TEST", "A", "NOERROR", ["192.0.2.1"]),
            ("h-192-0-2-1.test", "AAAA", "NOERROR", []),
            ("h-192-0-2-1.test", "MX", "NOERROR", ["1 mail.test."]),
            ("h-192-0-2-78.test", "A", "NOERROR", ["192.0.2.200"]),
            ("h-192-0-3-1.test", "A", "NXDOMAIN", []),
            ("h-192-0-2-01.test", "A", "NXDOMAIN", []),
            ("x.h-192-0-2-1.test", "A", "NXDOMAIN", []),
            ("alias.test", "A", "NOERROR", ["192.0.2.1", "h-192-0-2-1.test."]),
            ("h-2001-db8--9.six.test", "AAAA", "NOERROR", ["2001:db8::9"]),
            ("h-2001-db8--9.six.test", "A", "NOERROR", []),
            ("h-2001-db9--9.six.test", "AAAA", "NXDOMAIN", []),
            ("n0.n.test", "A", "NOERROR", ["198.51.100.10"]),
            ("n9.n.test", "A", "NOERROR", ["198.51.100.19"]),
            ("n10.n.test", "A", "NXDOMAIN", []),
            ("s-4294967295.n.test", "AAAA", "NOERROR", ["fd00::ffff:ffff"]),
            ("0--1.bare.test", "AAAA", "NOERROR", ["::1"]),
            (pointer("192.0.2.1"), "PTR", "NOERROR", ["h-192-0-2-1.test."]),
            (pointer("192.0.2.77"), "PTR", "NOERROR", ["real.test."]),
            (pointer("198.51.100.11"), "PTR", "NOERROR", ["n1.n.test."]),
            (pointer("2001:db8::9"), "PTR", "NOERROR", ["h-2001-db8--9.six.test."]),
            (pointer("fd00::1:0"), "PTR", "NOERROR", ["s-65536.n.test."]),
            (pointer("::1"), "PTR", "NOERROR", ["0--1.bare.test."]),
        ):
            assert [found(node, name, kind) for node in nodes] == [(code, data)] * 2, (name, kind)


def test_every_local_name_is_its_own_mail_server(folder: Path) -> None:
    hosts = write(folder / "hosts", "192.0.2.1 box.example", "2001:db8::1 six.example")
    options = (f"--addn-hosts={hosts}", "--selfmx", "--local=/example/")
    with both(*options) as nodes:
        for name, expected in {
            "box.example": ("NOERROR", ["1 box.example."]),
            "six.example": ("NOERROR", ["1 six.example."]),
            "none.example": ("NXDOMAIN", []),
        }.items():
            assert [found(node, name, "MX") for node in nodes] == [expected] * 2, name


def test_ipv4_addresses_are_left_out(folder: Path) -> None:
    hosts = write(folder / "hosts", "192.0.2.1 both.example", "2001:db8::1 both.example")
    options = ("--filter-A", f"--addn-hosts={hosts}", "--server=127.0.0.99#5300")
    with Lab() as built, contextlib.ExitStack() as stack:
        nodes = [built.namespace("ours"), built.namespace("theirs")]
        for node in nodes:
            stack.enter_context(FakeServer(node, "127.0.0.99", port=5300))
        stack.enter_context(Responder(nodes[0], *options))
        stack.enter_context(dnsmasq(nodes[1], *options))
        for name, kind, expected in (
            ("both.example", "A", ["192.0.2.1"]),
            ("both.example", "AAAA", ["2001:db8::1"]),
            ("outside.example", "A", []),
            ("outside.example", "A", []),
        ):
            assert [found(node, name, kind) for node in nodes] == [("NOERROR", expected)] * 2, (name, kind)


def test_servers_file(folder: Path) -> None:
    """dnsmasq reads it with SIGHUP; udpwatch does so, too, and also when it changes."""
    file = write(folder / "servers", "server=/corp.test/127.0.0.99#5300", "cname=a.test,b.test", "server=nowhere")
    options = (f"--servers-file={file}", "--server=/kept.test/127.0.0.99#5300")
    with Lab() as built, contextlib.ExitStack() as stack:
        nodes = [built.namespace("ours"), built.namespace("theirs")]
        for node in nodes:
            stack.enter_context(FakeServer(node, "127.0.0.99", port=5300))
        responder = stack.enter_context(Responder(nodes[0], *options))
        theirs = stack.enter_context(dnsmasq(nodes[1], *options))

        def answers() -> list[tuple[str, ...]]:
            names = ("x.corp.test", "x.lab.test", "x.kept.test", "a.test")
            return [tuple(found(node, name)[0] for name in names) for node in nodes]

        assert answers() == [("NOERROR", "REFUSED", "NOERROR", "REFUSED")] * 2
        problem = f"{file} line 2: 'cname': expected server=VALUE or rev-server=VALUE"
        wait_for(lambda: responder.has_logged(problem), "the problem to be logged")
        write(file, "server=/lab.test/127.0.0.99#5300", "server=/corp.test/")
        theirs.send_signal(signal.SIGHUP)
        wait_for(lambda: answers() == [("NXDOMAIN", "NOERROR", "NOERROR", "REFUSED")] * 2, "the new servers")
        file.unlink()
        responder.reload()
        theirs.send_signal(signal.SIGHUP)
        assert answers() == [("NXDOMAIN", "NOERROR", "NOERROR", "REFUSED")] * 2, "they stay"
