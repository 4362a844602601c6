"""Options about names, beside dnsmasq with the same options and files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dns_server import Responder, ask, rcode, texts, write
from dnsmasq import dnsmasq

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


def found(node: Namespace, name: str, kind: str = "A", address: str = "127.0.0.1") -> tuple[str, list[str]]:
    """Code and data of a response."""
    response = ask(node, address, name, kind)
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
