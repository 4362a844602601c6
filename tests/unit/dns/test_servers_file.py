"""Servers of a file that is read again while the responder runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from udpwatch.dns.cache import Cache
from udpwatch.dns.hosts_file import MAX_COMPLAINTS
from udpwatch.dns.names import name_from_text
from udpwatch.dns.reload import RouteReloader
from udpwatch.dns.responder import Responder
from udpwatch.dns.servers_file import read_servers
from udpwatch.dns.settings import DomainAddress, DomainServers, Server, Settings
from udpwatch.dns.zone import build

A, B = name_from_text("a.example"), name_from_text("b.example")
ONE, TWO, THREE = Server("192.0.2.1"), Server("192.0.2.2"), Server("192.0.2.3")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "servers"


def test_servers_are_added_to_those_of_the_options(file: Path) -> None:
    file.write_text(
        "# comment\n\nserver=192.0.2.2\nserver = /a.example/192.0.2.3  # why\nserver=/b.example/\n"
        "rev-server=10.0.0.0/8,192.0.2.3\nserver=192.0.2.1\n"
    )
    settings = Settings(servers=(ONE,), domain_servers=(DomainServers(A, (TWO,)),))
    assert read_servers(file, settings, pytest.fail) == (
        (ONE, TWO),
        (
            DomainServers(A, (TWO, THREE)),
            DomainServers(B, ()),
            DomainServers(name_from_text("10.in-addr.arpa"), (THREE,)),
        ),
    )


def test_invalid_lines_are_logged_and_skipped(file: Path) -> None:
    lines = (
        b"server=nowhere\ncname=a,b\nlocal=/a.example/\nserver\nserver=/a.example/#\n"
        b'server="x\nserver=\xff\nrev-server=10.0.0.0\nserver=192.0.2.2'
    )
    file.write_bytes(lines)
    settings = Settings(domain_servers=(DomainServers(A, (TWO,)),))
    complaints: list[str] = []
    servers, domains = read_servers(file, settings, complaints.append)
    assert servers == (TWO,)
    assert [each.domain for each in domains] == [A, name_from_text("0.0.0.10.in-addr.arpa")]
    assert [line.removeprefix(f"{file} line ").partition(":")[0] for line in complaints] == list("1234567")
    assert "server: invalid value 'nowhere'; expected an IPv4 or IPv6 address" in complaints[0]
    assert complaints[1].endswith("'cname': expected server=VALUE or rev-server=VALUE")
    assert "a.example already has another" in complaints[4]


def test_many_invalid_lines_are_counted(file: Path) -> None:
    file.write_text("x\n" * 1000)
    complaints: list[str] = []
    assert read_servers(file, Settings(), complaints.append) == ((), ())
    assert complaints[-1] == f"{1000 - MAX_COMPLAINTS} more bad lines in {file}"
    assert len(complaints) == MAX_COMPLAINTS + 1


def test_reload(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New servers are used at once; a file that cannot be read changes nothing; --address follows."""
    wild = (DomainAddress(name_from_text("example"), "192.0.2.9"),)
    settings = Settings(hosts=False, resolv=False, servers_file=file, servers=(ONE,), addresses=wild)
    responder = Responder(settings, build(settings, pytest.fail), Cache(10, 0))
    invalidated: list[int] = []
    forgotten: list[int] = []

    async def scene() -> None:
        routes = RouteReloader(
            settings, responder, lambda: forgotten.append(1), lambda _: False, lambda: invalidated.append(1)
        )
        routes.read()
        assert not await routes.read_servers_file()
        assert not await routes.read_servers_file()
        assert caplog.text.count("cannot read") == 1
        assert responder.routes.default == (ONE,)
        assert responder.zone.find(A, 1)
        file.write_text("server=192.0.2.2\nserver=/a.example/192.0.2.3\n")
        assert await routes.read_servers_file()
        assert responder.routes.default == (ONE, TWO)
        assert responder.routes.for_name(A) == (THREE,)
        assert responder.zone.find(A, 1) is None, "--server names a longer domain than --address"
        invalidated.clear()
        assert await routes.read_servers_file()
        assert not invalidated, "nothing has changed"
        file.write_text("")
        assert await routes.read_servers_file()
        assert invalidated
        assert forgotten
        assert responder.routes.default == (ONE,)
        assert responder.zone.find(A, 1)

    asyncio.run(scene())
