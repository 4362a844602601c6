"""Local names: reading hosts files, and looking up names."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dns_messages as m
import pytest

from udpwatch.dns import hosts_file, zone
from udpwatch.dns.cache import Cache
from udpwatch.dns.errors import FileError
from udpwatch.dns.hosts_file import MAX_COMPLAINTS
from udpwatch.dns.message import Rcode, parse_response
from udpwatch.dns.names import MAX_ADDRESSES, address_of, name_from_text, name_to_text, unpack_address
from udpwatch.dns.responder import Forward, Reply, Responder
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import DomainAddress, DomainServers, HostRecord, Server, Settings, StaticRecord
from udpwatch.dns.zone import Zone, build

UPSTREAM = Server("192.0.2.53")
OTHER_TYPES = [m.AAAA, m.HTTPS, m.TXT, m.MX, m.NS, m.SOA, m.SRV, m.CNAME, m.PTR, 43, 65280]

Load = Callable[..., tuple[Zone, list[str]]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A zone from the text of one hosts file, and the complaints."""

    def made(text: str | bytes, **changes: Any) -> tuple[Zone, list[str]]:
        path = tmp_path / "hosts"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return of_files(path, **changes)

    return made


def of_files(*paths: Path, missing_ok: bool = False, **changes: Any) -> tuple[Zone, list[str]]:
    complaints: list[str] = []
    return build(Settings(hosts=False, addn_hosts=paths, **changes), complaints.append, missing_ok), complaints


def of_settings(**changes: Any) -> Zone:
    return build(Settings(hosts=False, **changes), pytest.fail)


def wire(text: str) -> bytes:
    return name_from_text(text)


def addresses(table: Zone, text: str | bytes, kind: int = m.A) -> list[str]:
    """The numeric addresses of a name; [] for NODATA, ["?"] for what is not known here."""
    found = table.find(text if isinstance(text, bytes) else wire(text), kind)
    if found is None:
        return ["?"]
    return [unpack_address(data) for rrset in found.rrsets for data in rrset.data if rrset.type == kind]


def pointer(table: Zone, address: str) -> str | None:
    found = table.find(wire(ip_address(address).reverse_pointer), m.PTR)
    if not found:
        return None
    (rrset,) = found.rrsets
    (target,) = rrset.data
    return name_to_text(target)


def answer(table: Zone, text: str, kind: int = m.A, settings: Settings | None = None) -> tuple[int, int] | str:
    """Code and number of records, with an upstream server configured; "forward" if it is queried."""
    settings = settings or Settings(hosts=False)
    responder = Responder(settings, table, Cache(0, 0))
    responder.routes = Routes((UPSTREAM,), settings.domain_servers)
    found = responder.respond(m.query(wire(text), kind), 0.0)
    if isinstance(found, Forward):
        return "forward"
    assert isinstance(found, Reply)
    return found.rcode, m.counts_of(found.data)[1]


# ---- the syntax ----


def test_line_has_an_address_and_names(load: Load) -> None:
    table, complaints = load("192.0.2.1 a.example alias other.example\n2001:db8::1\tsix.example\t\tv6\n")
    for text in ("a.example", "alias", "other.example"):
        assert addresses(table, text) == ["192.0.2.1"]
    for text in ("six.example", "v6"):
        assert addresses(table, text, m.AAAA) == ["2001:db8::1"]
    assert complaints == []
    assert table.entries == 5


@pytest.mark.parametrize(
    "text",
    [
        "192.0.2.1 a.example",
        "192.0.2.1 a.example\r\n",
        "\t 192.0.2.1\t \ta.example  \t\n",
        "192.0.2.1 a.example # b.example\n",
        "192.0.2.1 a.example#b.example\n",
        "#192.0.2.9 b.example\n\n   \n#\n192.0.2.1 a.example",
        "192.0.2.1 A.EXAMPLE\n",
        "192.0.2.1 a.example.\n",
        "192.0.2.1 a.example\n192.0.2.1 a.example\n",
        "192.0.2.1 a.example a.example A.example\n",
        b"\xef\xbb\xbf192.0.2.1 a.example\n",
        "192.0.2.1\x0ba.example\x0c\n",
    ],
)
def test_lines_with_unusual_spacing(load: Load, text: str | bytes) -> None:
    table, complaints = load(text)
    assert addresses(table, "a.example") == ["192.0.2.1"]
    assert addresses(table, "b.example") == ["?"]
    assert pointer(table, "192.0.2.1") == "a.example"
    assert complaints == []


def test_carriage_return_does_not_end_a_line(load: Load) -> None:
    table, complaints = load("192.0.2.1 a\r192.0.2.2 b\r")
    assert addresses(table, "b") == ["192.0.2.1"], "as dnsmasq: all of it is one line"
    assert complaints == []


def test_addresses_of_a_name_are_collected(load: Load) -> None:
    table, _ = load("192.0.2.2 a\n192.0.2.1 a\n2001:db8::1 a\n192.0.2.2 a\n")
    assert addresses(table, "a") == ["192.0.2.2", "192.0.2.1"]
    assert addresses(table, "a", m.AAAA) == ["2001:db8::1"]


def test_addresses_are_compared_in_full(load: Load) -> None:
    """Two addresses that together contain the octets of a third."""
    table, _ = load("1.2.3.4 a\n5.6.7.8 a\n2.3.4.5 a\n3.4.5.6 a\n5.6.7.8 a\n")
    assert addresses(table, "a") == ["1.2.3.4", "5.6.7.8", "2.3.4.5", "3.4.5.6"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("under_score.example", None), ("-dash-", None), ("1.2.3.4", None), ("ü.example", b"\x07xn--tda\x07example\0")],
)
def test_unusual_names_are_accepted(load: Load, text: str, name: bytes | None) -> None:
    table, complaints = load(f"192.0.2.1 {text}\n")
    assert addresses(table, name or wire(text)) == ["192.0.2.1"]
    assert complaints == []


def test_international_name_that_cannot_be_converted(load: Load, tmp_path: Path) -> None:
    table, complaints = load("192.0.2.1 good.example i♥ny.example Bücher.Example\n192.0.2.2 next.example\n")
    assert [addresses(table, f"{each}.example") for each in ("good", "xn--bcher-kva")] == [["192.0.2.1"]] * 2
    assert addresses(table, "next.example") == ["192.0.2.2"]
    assert complaints == [f"bad name at {tmp_path / 'hosts'} line 1"]


def test_longest_names(load: Load) -> None:
    longest = ".".join(["a" * 63] * 3 + ["b" * 61])
    table, complaints = load(f"192.0.2.1 {longest}\n192.0.2.1 c{longest}\n192.0.2.1 {'d' * 64}.example\n")
    assert addresses(table, longest) == ["192.0.2.1"]
    assert [line.partition(" at ")[0] for line in complaints] == ["bad name", "bad name"]


def test_ttl_is_local_ttl(load: Load) -> None:
    table, _ = load("192.0.2.1 a\n", local_ttl=77)
    found = table.find(wire("a"), m.A)
    assert found
    assert found.rrsets[0].ttl == 77


# ---- bad lines ----


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("192.0.2.256 a", "address"),
        ("192.0.2 a", "address"),
        ("example 192.0.2.1", "address"),
        ("192.0.2.1/24 a", "address"),
        ("2001:db8::1%eth0 a", "address"),
        ("2001:db8:::1 a", "address"),
        ("192.0.2.1\0 a", "address"),
        ("\uff1192.0.2.1 a", "address"),
        ("192.0.2.1", "line without a name"),
        ("192.0.2.1 # a", "line without a name"),
        ("192.0.2.1 .", "name"),
        ("192.0.2.1 a..b", "name"),
        ("192.0.2.1 .a", "name"),
        ("192.0.2.1 a\0b", "name"),
        ("192.0.2.1 a\x01b", "name"),
        ("192.0.2.1 a\x7f", "name"),
        ("192.0.2.1 a\\032b", "name"),
        ("192.0.2.1 \u202ea", "name"),
    ],
)
def test_invalid_line_is_reported_and_skipped(load: Load, tmp_path: Path, line: str, problem: str) -> None:
    table, complaints = load(f"192.0.2.8 before\n{line}\n192.0.2.9 after\n")
    assert complaints == [f"bad {problem} at {tmp_path / 'hosts'} line 2"]
    assert addresses(table, "before") == ["192.0.2.8"]
    assert addresses(table, "after") == ["192.0.2.9"]
    assert table.entries == 2


def test_line_that_is_not_utf8(load: Load) -> None:
    table, complaints = load(b"\xff\xfe a\n192.0.2.1 \xff\xfe b\n\x00\x00\x00\x00\n192.0.2.2 c\n")
    assert [line.partition(" at ")[0] for line in complaints] == ["bad address", "bad name", "bad address"]
    assert addresses(table, "b") == ["192.0.2.1"], "the good names of a bad line count"
    assert addresses(table, "c") == ["192.0.2.2"]


def test_complaints_are_limited(load: Load, tmp_path: Path) -> None:
    _, complaints = load("nonsense line\n" * 1000)
    assert len(complaints) == MAX_COMPLAINTS + 1
    assert complaints[-1] == f"{1000 - MAX_COMPLAINTS} more bad lines in {tmp_path / 'hosts'}"


def test_huge_line(load: Load) -> None:
    """Many names of one address; and one word of a megabyte, which is not logged."""
    many = " ".join(f"n{each}.example" for each in range(50_000))
    table, complaints = load(f"192.0.2.1 {many}\n192.0.2.2 {'x' * (1 << 20)}\n{'y' * (1 << 20)}\n192.0.2.3 z\n")
    assert addresses(table, "n49999.example") == ["192.0.2.1"]
    assert addresses(table, "z") == ["192.0.2.3"]
    assert len(complaints) == 2
    assert all(len(line) < 300 for line in complaints)


def test_number_of_addresses_of_a_name_is_bounded(load: Load) -> None:
    """Not quadratic, and the response fits into a message, which cannot count above 65,535 records."""
    lines = "".join(f"10.{each >> 16}.{each >> 8 & 255}.{each & 255} many\n" for each in range(70_000))
    begun = time.process_time()
    table, complaints = load(lines)
    assert time.process_time() - begun < 10, "0.3 s"
    assert len(addresses(table, "many")) == MAX_ADDRESSES
    assert f"more than {MAX_ADDRESSES} addresses of a name" in complaints[0]
    assert pointer(table, "10.1.0.0") == "many"
    reply = Responder(Settings(hosts=False), table, Cache(0, 0)).respond(m.query("many"), 0.0, tcp=True)
    assert isinstance(reply, Reply)
    assert m.counts_of(reply.data)[1] == MAX_ADDRESSES


# ---- files ----


def test_folder_is_read_in_order_without_backups(tmp_path: Path) -> None:
    for name in ("b", "a", "#c#", ".d", "e~", "#f", "g#"):
        (tmp_path / name).write_text(f"192.0.2.1 {name.strip('.~').replace('#', 'hash')}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    table, complaints = of_files(tmp_path)
    assert complaints == []
    assert pointer(table, "192.0.2.1") is not None
    known = {name for name in ("a", "b", "hashchash", "d", "e", "gone") if addresses(table, name) != ["?"]}
    assert known == {"a", "b"}
    found = list(hosts_file.hosts_files(Settings(hosts=False, addn_hosts=(tmp_path,)), pytest.fail))
    assert [path.name for path in found] == ["#f", "a", "b", "g#"]


def test_first_file_gives_the_reverse_name(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("192.0.2.1 first alias\n")
    (tmp_path / "2").write_text("192.0.2.1 second\n192.0.2.2 first\n")
    table, _ = of_files(tmp_path / "1", tmp_path / "2")
    assert addresses(table, "first") == ["192.0.2.1", "192.0.2.2"]
    assert pointer(table, "192.0.2.1") == "first"
    assert pointer(table, "192.0.2.2") == "first"


def test_dev_null_is_an_empty_file() -> None:
    table, complaints = of_files(Path("/dev/null"))
    assert (table.entries, complaints) == (0, [])


def test_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileError, match=f"cannot read {tmp_path}/fifo: not a regular file"):
        of_files(tmp_path / "fifo")


@pytest.mark.parametrize(
    "kind", ["missing", "device", "socket", "folder in a file", "too long", "loop", "link to nothing"]
)
def test_unreadable_file_fails_the_build(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hosts"
    (tmp_path / "good").write_text("192.0.2.1 good\n")
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as link:
            link.bind(str(path))
    elif kind == "folder in a file":
        path = tmp_path / "good" / "hosts"
    elif kind == "too long":
        path = tmp_path / ("x" * 300)
    elif kind in ("loop", "link to nothing"):
        path.symlink_to(path if kind == "loop" else tmp_path / "nothing")
    with pytest.raises(FileError, match=f"^cannot read {path}: "):
        of_files(tmp_path / "good", path)
    table, complaints = of_files(path, tmp_path / "good", missing_ok=True)
    assert addresses(table, "good") == ["192.0.2.1"]
    assert [line.startswith(f"cannot read {path}: ") for line in complaints] == [True]


def test_broken_link_in_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileError, match="No such file"):
        of_files(tmp_path)


def test_etc_hosts_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hosts_file, zone):
        monkeypatch.setattr(module, "ETC_HOSTS", tmp_path / "hosts")
    assert build(Settings(), pytest.fail).entries == 0
    (tmp_path / "hosts").write_text("192.0.2.1 a\n")
    assert build(Settings(), pytest.fail).entries == 1


def test_file_that_is_being_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, waits = tmp_path / "hosts", []
    path.write_text("192.0.2.1 half")
    os.utime(path, (1_000_000_000, 1_000_000_000))  # unchanged for a long time, except for its size
    states = iter([1, 2, 3])

    def fstat(descriptor: int) -> os.stat_result:
        state, found = next(states, 0), real(descriptor)
        return os.stat_result((*found[:6], found.st_size - 5 if state == 1 else found.st_size, *found[7:]))

    real = os.fstat
    monkeypatch.setattr(hosts_file.os, "fstat", fstat)
    monkeypatch.setattr(hosts_file.time, "sleep", waits.append)
    table, _ = of_files(path)
    assert addresses(table, "half") == ["192.0.2.1"]
    assert waits == [hosts_file.CHANGING_SECONDS]


def test_file_that_keeps_changing_is_read_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, waits, stamps = tmp_path / "hosts", [], iter(range(1000))
    path.write_text("192.0.2.1 a\n")
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        stamp = 10**9 * next(stamps)
        os.utime(path, ns=(stamp, stamp))
        return real(descriptor)

    monkeypatch.setattr(hosts_file.os, "fstat", fstat)
    monkeypatch.setattr(hosts_file.time, "sleep", waits.append)
    table, _ = of_files(path)
    assert addresses(table, "a") == ["192.0.2.1"]
    assert len(waits) == hosts_file.CHANGING_TRIES


# ---- reverse names ----


def test_reverse_names_of_both_families(load: Load) -> None:
    table, _ = load("192.0.2.1 first second\n192.0.2.1 third\n2001:db8::a:1 six\n::1 localhost\n")
    assert pointer(table, "192.0.2.1") == "first"
    assert pointer(table, "2001:db8::a:1") == "six"
    assert pointer(table, "::1") == "localhost"
    assert pointer(table, "192.0.2.2") is None


@pytest.mark.parametrize(
    "text",
    [
        "2.0.192.in-addr.arpa",
        "x.1.2.0.192.in-addr.arpa",
        "01.2.0.192.in-addr.arpa",
        "257.2.0.192.in-addr.arpa",
        "a.2.0.192.in-addr.arpa",
        "1.2.0.192.x.in-addr.arpa",
        "1.2.0.192.in-addr.arpa.example",
        "1\\.2.0.192.in-addr.arpa",
        "1.2.0.192.ip6.arpa",
        "1.2.0.192.e.x\\007in-addr\\004arpa",
    ],
)
def test_invalid_reverse_names(load: Load, text: str) -> None:
    table, _ = load("192.0.2.1 first\n")
    assert table.find(wire(text), m.PTR) is None
    assert address_of(wire(text)) is None


def test_name_that_only_ends_like_a_reverse_name() -> None:
    """A label with the octets of `in-addr.arpa`, after four numbers."""
    inside = b"\x011\x012\x010\x03192\x01e\x0fxx\x07in-addr\x04arpa\x00"
    assert address_of(inside) is None
    assert address_of(b"\x01a" * 33 + b"\x0ax\x03ip6\x04arpa\x00") is None


def test_other_types_of_a_reverse_name_are_nodata(load: Load) -> None:
    table, _ = load("192.0.2.1 first\n")
    for kind in (m.A, m.AAAA, m.TXT, m.SOA):
        assert answer(table, "1.2.0.192.in-addr.arpa", kind) == (Rcode.NOERROR, 0)


# ---- settings ----


def test_expand_hosts(load: Load) -> None:
    table, _ = load(
        "192.0.2.1 short alias\n192.0.2.2 long.other\n", expand_hosts=True, domain=wire("example.org"), local_ttl=3
    )
    for text in ("short", "short.example.org", "alias", "alias.example.org"):
        assert addresses(table, text) == ["192.0.2.1"]
    assert addresses(table, "long.other.example.org") == ["?"]
    assert pointer(table, "192.0.2.1") == "short.example.org"
    assert pointer(table, "192.0.2.2") == "long.other"


def test_domain_alone_does_not_expand_names(load: Load) -> None:
    table, _ = load("192.0.2.1 short\n", domain=wire("example.org"))
    assert addresses(table, "short.example.org") == ["?"]


def test_name_too_long_is_not_expanded(load: Load) -> None:
    domain = wire(".".join(["d" * 63] * 3))
    table, complaints = load(f"192.0.2.1 {'s' * 63}\n", expand_hosts=True, domain=domain)
    assert addresses(table, "s" * 63) == ["192.0.2.1"]
    assert len(complaints) == 1


def test_host_records(load: Load) -> None:
    record = HostRecord((wire("canonical"), wire("alias")), ("192.0.2.1", "2001:db8::1"), 60)
    table, _ = load("192.0.2.1 of-a-file alias\n192.0.2.3 alias\n", host_records=(record,), local_ttl=5)
    assert pointer(table, "192.0.2.1") == "canonical", "they come before the files"
    assert addresses(table, "alias") == ["192.0.2.1", "192.0.2.3"]
    assert addresses(table, "alias", m.AAAA) == ["2001:db8::1"]
    ttls = {name: found.rrsets[0].ttl for name in ("alias", "of-a-file") if (found := table.find(wire(name), m.A))}
    assert ttls == {"alias": 60, "of-a-file": 5}


def test_host_record_without_addresses_gets_nodata() -> None:
    table = of_settings(host_records=(HostRecord((wire("empty"),), ()),))
    assert answer(table, "empty") == (Rcode.NOERROR, 0)


def cnames(*pairs: tuple[str, str], ttl: int | None = None) -> tuple[StaticRecord, ...]:
    return tuple(StaticRecord(wire(alias), m.CNAME, wire(target), ttl) for alias, target in pairs)


def test_alias_of_a_local_name(load: Load) -> None:
    table, _ = load("192.0.2.1 a\n", records=cnames(("b", "a"), ("c", "b"), ("out", "elsewhere.example"), ttl=9))
    found = table.find(wire("c"), m.A)
    assert found
    told = [(name_to_text(rrset.owner), rrset.type, rrset.ttl) for rrset in found.rrsets]
    assert told == [("c", m.CNAME, 9), ("b", m.CNAME, 9), ("a", m.A, 0)]
    assert answer(table, "c") == (Rcode.NOERROR, 3)
    assert answer(table, "c", m.TXT) == (Rcode.NOERROR, 2), "NODATA through two aliases"
    assert answer(table, "c", m.CNAME) == (Rcode.NOERROR, 1)
    assert answer(table, "out") == "forward", "as dnsmasq: no response without the target"
    assert answer(table, "out", m.CNAME) == (Rcode.NOERROR, 1)


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 40])
def test_alias_loop_ends(length: int) -> None:
    ring = cnames(*((f"n{each}", f"n{(each + 1) % length}") for each in range(length)))
    table = of_settings(records=ring)
    assert answer(table, "n0") == (Rcode.NOERROR, 0)
    assert answer(table, "n0", m.CNAME) == (Rcode.NOERROR, 1)


def test_alias_into_a_wildcard_domain() -> None:
    nothing = (DomainAddress(wire("nx"), None), DomainAddress(wire("wild"), "192.0.2.1"))
    table = of_settings(records=cnames(("a", "b.nx"), ("c", "d.wild")), addresses=nothing)
    assert answer(table, "a") == (Rcode.NXDOMAIN, 1), "the code is that of the last name (RFC 6604)"
    assert answer(table, "c") == (Rcode.NOERROR, 2)


def test_records_of_several_types() -> None:
    name, kinds = wire("a"), (m.TXT, m.MX, m.TXT, m.SRV)
    table = of_settings(records=tuple(StaticRecord(name, kind, bytes(7)) for kind in kinds), local_ttl=4)
    assert [answer(table, "a", kind) for kind in (m.TXT, m.MX, m.SRV)] == [(0, 2), (0, 1), (0, 1)]


def test_wildcard_addresses(load: Load) -> None:
    table, _ = load(
        "192.0.2.1 known.wild\n",
        addresses=(
            DomainAddress(wire("wild"), "192.0.2.9"),
            DomainAddress(wire("wild"), "2001:db8::9"),
            DomainAddress(wire("deep.wild"), "192.0.2.10"),
            DomainAddress(wire("deep.wild"), "192.0.2.11"),
            DomainAddress(wire("gone.wild"), None),
        ),
    )
    assert addresses(table, "wild") == ["192.0.2.9"]
    assert addresses(table, "x.y.wild") == ["192.0.2.9"]
    assert addresses(table, "x.wild", m.AAAA) == ["2001:db8::9"]
    assert addresses(table, "known.wild") == ["192.0.2.1"], "hosts files before wildcards"
    assert answer(table, "known.wild", m.AAAA) == (Rcode.NOERROR, 0), "and for every type"
    assert addresses(table, "a.deep.wild") == ["192.0.2.10", "192.0.2.11"]
    assert answer(table, "a.deep.wild", m.AAAA) == (Rcode.NOERROR, 0), "only the most specific domain"
    assert answer(table, "x.wild", m.TXT) == (Rcode.NOERROR, 0)
    assert addresses(table, "notwild") == ["?"]
    assert answer(table, "gone.wild") == (Rcode.NXDOMAIN, 0)
    assert answer(table, "x.gone.wild", m.TXT) == (Rcode.NXDOMAIN, 0)


def test_address_for_every_name() -> None:
    table = of_settings(addresses=(DomainAddress(b"\0", "192.0.2.9"),))
    assert addresses(table, "any.name.at.all") == ["192.0.2.9"]
    assert addresses(table, b"\0") == ["192.0.2.9"]


OTHER = Server("10.0.0.2")
STANDARD = "the servers of the rest"


@pytest.mark.parametrize(
    ("address", "server", "expected"),
    [
        # --address=/NAME/ADDRESS (None: NXDOMAIN), --server=/NAME/SERVER, who answers for which name; as dnsmasq 2.90
        (("#", "192.0.2.9"), ("ok", OTHER), {"ok": OTHER, "www.ok": OTHER, "x": "here", "xok": "here", ".": "here"}),
        (("#", "192.0.2.9"), ("std", STANDARD), {"a.std": UPSTREAM, "b": "here"}),
        (("#", "192.0.2.9"), ("ours", None), {"a.ours": Rcode.NXDOMAIN, "b": "here"}),
        (("#", "192.0.2.9"), ("//", OTHER), {"plain": OTHER, "two.labels": "here", ".": "here"}),
        (("#", "192.0.2.9"), ("//", None), {"plain": Rcode.NXDOMAIN, "two.labels": "here"}),
        (("plain", "192.0.2.9"), ("//", OTHER), {"plain": "here", "a.plain": "here", "other": OTHER}),
        (("ex", "192.0.2.9"), ("sub.ex", OTHER), {"sub.ex": OTHER, "a.sub.ex": OTHER, "a.ex": "here", "b": UPSTREAM}),
        (("sub.ex", "192.0.2.9"), ("ex", OTHER), {"sub.ex": "here", "a.sub.ex": "here", "a.ex": OTHER}),
        (("ads", None), ("ok.ads", STANDARD), {"ok.ads": UPSTREAM, "x.ok.ads": UPSTREAM, "x.ads": Rcode.NXDOMAIN}),
        # the same domain: an address wins, NXDOMAIN does not
        (("ex", "192.0.2.9"), ("ex", OTHER), {"ex": "here", "a.ex": "here"}),
        (("ex", "192.0.2.9"), ("ex", None), {"a.ex": "here"}),
        (("ex", None), ("ex", OTHER), {"ex": OTHER, "a.ex": OTHER}),
        (("ex", None), ("ex", STANDARD), {"a.ex": UPSTREAM}),
        (("ex", None), ("ex", None), {"a.ex": Rcode.NXDOMAIN}),
    ],
)
def test_longest_domain_wins_between_address_and_server(
    address: tuple[str, str | None], server: tuple[str, Server | str | None], expected: dict[str, Server | str | int]
) -> None:
    domain, told = (b"" if server[0] == "//" else wire(server[0])), server[1]
    settings = Settings(
        hosts=False,
        addresses=(DomainAddress(b"\0" if address[0] == "#" else wire(address[0]), address[1]),),
        domain_servers=(DomainServers(domain, (told,) if isinstance(told, Server) else (), told == STANDARD),),
    )
    responder = Responder(settings, build(settings, pytest.fail), Cache(0, 0))
    responder.routes = Routes((UPSTREAM,), settings.domain_servers)
    for text, who in expected.items():
        found = responder.respond(m.query(wire(text)), 0.0)
        if isinstance(found, Forward):
            assert responder.routes.for_name(wire(text)) == (who,), text
        else:
            assert isinstance(found, Reply)
            assert ("here" if m.counts_of(found.data)[1] else found.rcode) == who, text


def test_server_of_a_domain_does_not_hide_local_names(load: Load) -> None:
    table, _ = load(
        "192.0.2.1 a.ok\n",
        addresses=(DomainAddress(b"\0", "192.0.2.9"),),
        domain_servers=(DomainServers(wire("ok"), (OTHER,)),),
        records=cnames(("alias.example", "b.ok")),
    )
    assert [addresses(table, text) for text in ("a.ok", "b.ok", "alias.example")] == [["192.0.2.1"], ["?"], ["?"]]


# ---- what exists ----


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_local_name_is_answered_for_every_type(load: Load, kind: int) -> None:
    """musl applies an upstream NXDOMAIN for AAAA to A, too."""
    table, _ = load("192.0.2.1 a.example\n")
    assert answer(table, "a.example", kind) == (Rcode.NOERROR, 0)


def test_mx_of_local_names(load: Load) -> None:
    lines = "192.0.2.1 a.example\n2001:db8::1 b.example\n"
    records = (StaticRecord(wire("own.example"), m.MX, b"\0\7" + wire("x")), *cnames(("alias.example", "a.example")))
    hosts = (HostRecord((wire("own.example"), wire("h.example")), ("192.0.2.3",)),)
    for changes, own in (({"local_mx": wire("mail")}, ""), ({"self_mx": True}, "self")):
        table, _ = load(lines, records=records, host_records=hosts, **changes)
        for text in ("a.example", "b.example", "h.example"):
            found = table.find(wire(text), m.MX)
            assert found and [(rrset.type, rrset.data) for rrset in found.rrsets] == [
                (m.MX, (b"\0\1" + wire(text if own else "mail"),))
            ]
            assert answer(table, text, m.TXT) == (Rcode.NOERROR, 0)
        assert answer(table, "alias.example", m.MX) == (Rcode.NOERROR, 2)
        assert answer(table, "own.example", m.MX) == (Rcode.NOERROR, 1)
        assert answer(table, "c.example", m.MX) == "forward"
    assert answer(load(lines)[0], "a.example", m.MX) == (Rcode.NOERROR, 0)


ONLY = [m.MX, m.TXT, m.SRV, m.PTR]


@pytest.mark.parametrize("kind", ONLY)
def test_name_with_other_records_is_forwarded_for_other_types(kind: int) -> None:
    """`--mx-host=example.org,..` does not hide a public domain's addresses; a local-only domain has none."""
    records = tuple(
        StaticRecord(wire(text), kind, bytes(7)) for text in ("a.example", "a.ours", "plain", "a.nx", "a.w")
    )
    settings = Settings(
        hosts=False,
        records=records,
        domain_needed=True,
        domain_servers=(DomainServers(wire("ours"), ()),),
        addresses=(DomainAddress(wire("nx"), None), DomainAddress(wire("w"), "192.0.2.9")),
    )
    table = build(settings, pytest.fail)
    for other in {m.A, m.AAAA, *OTHER_TYPES} - {kind}:
        assert answer(table, "a.example", other, settings) == "forward"
        for text in ("a.ours", "a.nx"):
            assert answer(table, text, other, settings) == (Rcode.NOERROR, 0), "no NXDOMAIN"
    assert answer(table, "plain", m.A, settings) == (Rcode.NOERROR, 0), "by --domain-needed: not denied"
    assert answer(table, "a.w", m.A, settings) == (Rcode.NOERROR, 1), "by --address"
    for text in ("a.example", "a.ours", "plain", "a.nx", "a.w"):
        assert answer(table, text, kind, settings) == (Rcode.NOERROR, 1)


@pytest.mark.parametrize("kind", ONLY)
def test_upstream_nxdomain_does_not_deny_local_records(kind: int) -> None:
    settings = Settings(hosts=False, records=(StaticRecord(wire("a.example"), kind, bytes(7)),))
    for text, rcode in (("a.example", Rcode.NOERROR), ("b.example", Rcode.NXDOMAIN), ("x.a.example", Rcode.NXDOMAIN)):
        assert after_nxdomain(settings, text) == rcode


def after_nxdomain(settings: Settings, text: str) -> int:
    """What a client gets if an upstream server denies a name."""
    responder = Responder(settings, build(settings, pytest.fail), Cache(10, 0))
    denied = m.response(text, m.A, (), (m.soa(300, 60),), rcode=Rcode.NXDOMAIN)
    entry = responder.entry_of(parse_response(denied), 0.0)
    assert entry.expires == 60.0
    return entry.rcode


def test_upstream_nxdomain_does_not_deny_local_names_below(tmp_path: Path) -> None:
    """RFC 8020: NXDOMAIN for a name denies all names below it."""
    file = tmp_path / "hosts"
    file.write_text("192.0.2.1 a.b.host.example\n")
    settings = Settings(
        hosts=False,
        addn_hosts=(file,),
        host_records=(HostRecord((wire("a.record.example"),), ("192.0.2.2",)),),
        records=(StaticRecord(wire("a.text.example"), m.TXT, b"\1x"), *cnames(("a.alias.example", "x"))),
        addresses=(DomainAddress(wire("a.wild.example"), "192.0.2.3"), DomainAddress(wire("a.blocked.other"), None)),
    )
    for text in ("b.host", "host", "record", "text", "alias", "wild"):
        assert after_nxdomain(settings, f"{text}.example") == Rcode.NOERROR, text
    for text in ("example", "HOST.example"):
        assert after_nxdomain(settings, text) == Rcode.NOERROR, text
    for text in ("x.host.example", "x.a.b.host.example", "other", "blocked.other", "ost.example"):
        assert after_nxdomain(settings, text) == Rcode.NXDOMAIN, text
    domain_needed = replace(settings, domain_needed=True)
    table = build(domain_needed, pytest.fail)
    assert answer(table, "example", m.A, domain_needed) == (Rcode.NOERROR, 0), "as dnsmasq"
    assert answer(table, "nothing", m.A, domain_needed) == (Rcode.NXDOMAIN, 0)


def test_alias_of_a_name_without_address() -> None:
    """As dnsmasq: the alias alone, without querying a server that does not know its target."""
    table = of_settings(records=(*cnames(("a", "text")), StaticRecord(wire("text"), m.TXT, b"\1x")))
    assert [answer(table, "a", kind) for kind in (m.TXT, m.A, m.MX)] == [(0, 2), (0, 1), (0, 1)]
    assert answer(table, "text", m.A) == "forward"


def test_unknown_names_are_forwarded(load: Load) -> None:
    table, _ = load("192.0.2.1 a.example\n")
    assert answer(table, "b.example") == "forward"
    assert answer(table, "b.a.example") == "forward"


def test_empty_non_terminal(load: Load) -> None:
    """It is forwarded, except in a local-only domain. There NXDOMAIN would deny what is below it (RFC 8020)."""
    ours = (DomainServers(wire("ours"), ()), DomainServers(wire("theirs.ours"), (UPSTREAM,)))
    settings = Settings(
        hosts=False,
        domain_servers=ours,
        addresses=(DomainAddress(wire("nx"), None), DomainAddress(wire("w"), "192.0.2.9")),
    )
    lines = (
        "192.0.2.1 a.b.example\n192.0.2.2 a.b.c.ours\n192.0.2.3 a.b.theirs.ours\n192.0.2.4 a.b.nx\n192.0.2.5 a.b.w\n"
    )
    table, _ = load(lines, domain_servers=ours, addresses=settings.addresses)
    asked = {text: answer(table, text, m.A, settings) for text in ("b.example", "b.theirs.ours", "b.w")}
    assert asked == {"b.example": "forward", "b.theirs.ours": "forward", "b.w": (Rcode.NOERROR, 1)}
    for text in ("b.c.ours", "c.ours", "ours", "b.nx", "nx"):
        assert answer(table, text, m.A, settings) == (Rcode.NOERROR, 0), text
    for text in ("x.ours", "x.b.c.ours", "x.nx", "x.a.b.nx"):
        assert answer(table, text, m.A, settings) == (Rcode.NXDOMAIN, 0), text


def test_origin_is_the_file_when_queries_are_logged(load: Load, tmp_path: Path) -> None:
    table, _ = load("192.0.2.1 a\n", log_queries=True, records=cnames(("b", "a")))
    origins = {name: found.origin for name in ("a", "b") if (found := table.find(wire(name), m.CNAME))}
    assert origins == {"a": str(tmp_path / "hosts"), "b": "config"}


# ---- size ----


def test_many_domains_and_many_names(load: Load) -> None:
    """A block list and a hosts file: the cost is their sum, not their product."""
    blocked = tuple(DomainAddress(wire(f"ads-{each}.example"), None) for each in range(20_000))
    lines = "".join(f"192.0.2.1 a.host-{each}.example a.ads-{each}.example\n" for each in range(20_000))
    begun = time.process_time()
    table, _ = load(lines, addresses=blocked)
    assert time.process_time() - begun < 20, "0.3 s"
    assert answer(table, "ads-19999.example") == (Rcode.NOERROR, 0)
    assert answer(table, "b.ads-19999.example") == (Rcode.NXDOMAIN, 0)
    assert answer(table, "host-19999.example") == "forward"


def test_many_lines_load(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """200,000 here; UDPWATCH_LINES=1000000 for a million."""
    lines = int(os.environ.get("UDPWATCH_LINES", "200000"))
    text = "".join(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255} host-{n}.example.org host-{n}\n" for n in range(lines))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    table, complaints = load(text, domain_servers=(DomainServers(wire("lan"), ()),))
    seconds = time.process_time() - begun
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with capsys.disabled():
        print(f" {lines} lines: {seconds:.1f} s, {grown >> 10} MB", end=" ")
    assert (table.entries, complaints) == (2 * lines, [])
    assert addresses(table, f"host-{lines - 1}.example.org") != ["?"]
    assert pointer(table, "10.0.2.3") == "host-515.example.org"
