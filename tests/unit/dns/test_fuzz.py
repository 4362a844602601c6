"""Fuzzing the parser: it raises only Malformed, agrees with dnspython, and counts its steps.

`UDPWATCH_FUZZ=1` (`make fuzz`) looks ten times as long.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns_messages as m
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import udpwatch
from udpwatch.dns import message
from udpwatch.dns.cache import Cache
from udpwatch.dns.cache_entry import MAX_TTL, entry_of, failure
from udpwatch.dns.message import Malformed, Steps, parse_query, parse_response, read_name
from udpwatch.dns.metrics import DnsCollector, Metrics
from udpwatch.dns.names import lower, name_from_text, name_to_text
from udpwatch.dns.policy import rebinds
from udpwatch.dns.querylog import QueryLog
from udpwatch.dns.responder import Drop, Forward, Reply, Responder, from_entry
from udpwatch.dns.routes import Routes
from udpwatch.dns.settings import DomainAddress, DomainServers, HostRecord, Server, Settings, StaticRecord
from udpwatch.dns.zone import build

LONG = os.environ.get("UDPWATCH_FUZZ", "") not in ("", "0")
ROUNDS = 4_000 if LONG else 400
settings.register_profile("dns", max_examples=ROUNDS, deadline=None, suppress_health_check=list(HealthCheck))
fuzz = settings(settings.get_profile("dns"))

SETTINGS = Settings(
    hosts=False,
    host_records=(HostRecord((name_from_text("a.example"),), ("192.0.2.1", "2001:db8::1")),),
    records=(
        StaticRecord(name_from_text("t.example"), m.TXT, b"\x02hi"),
        StaticRecord(name_from_text("c.example"), m.CNAME, name_from_text("a.example")),
        StaticRecord(name_from_text("many.example"), m.TXT, b"\xff" + b"x" * 255),
        *(StaticRecord(name_from_text("many.example"), m.TXT, bytes((1, each))) for each in range(200)),
    ),
    addresses=(DomainAddress(name_from_text("wild"), "192.0.2.9"), DomainAddress(name_from_text("nx"), None)),
    domain_servers=(DomainServers(name_from_text("ours"), ()), DomainServers(b"", ())),
    bogus_priv=True,
    domain_needed=True,
    stop_dns_rebind=True,
)
ZONE = build(SETTINGS, pytest.fail)
#: names that are local, or almost
NAMES = ["a.example", "A.eXample", "t.example", "c.example", "many.example", "x.wild", "x.nx", "x.ours", "plain", ""]
NAMES += ["1.2.0.192.in-addr.arpa", "1.0.0.10.in-addr.arpa", "version.bind", "servers.bind", "cached.example"]
TYPES = [m.A, m.AAAA, m.CNAME, m.PTR, m.TXT, m.HTTPS, m.SOA, m.ANY, m.OPT, 0, 250, 251, 252, 65535]
CHAIN = (
    m.record(m.CNAME, m.name("b.example"), 60),
    m.record(m.CNAME, m.name("c.example"), 50, m.name("b.example")),
    m.record(m.A, bytes(4), 40, m.name("c.example")),
)
#: messages to mutate
REAL = [
    m.query("a.example"),
    m.query("cached.example", m.AAAA, m.opt(m.option(10, bytes(8)), flags=m.DO)),
    m.query("many.example", m.TXT, m.opt(size=4096)),
    m.query("version.bind", m.TXT, klass=m.CH),
    m.query("1.2.0.192.in-addr.arpa", m.PTR, flags=m.RD | m.AD),
    m.response("cached.example", m.A, CHAIN, (m.soa(),), (m.opt(),)),
    m.response("cached.example", m.AAAA, authorities=(m.soa(),), rcode=3),
    m.response("cached.example", m.A, flags=m.TC),
    m.response("1.2.0.192.in-addr.arpa", m.PTR, (m.record(m.PTR, b"\x01x\xc0\x0c", 5),)),
]
#: octets that parsers handle specially
ODD = [0, 1, 3, 0x3F, 0x40, 0x80, 0xBF, 0xC0, 0xC1, 0xFF, 12, 41]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.integers(0, 4))
        if what == 0:
            data[at : at + 1] = bytes([draw(st.one_of(st.sampled_from(ODD), st.integers(0, 255)))])
        elif what == 1:
            del data[at:]
        elif what == 2:
            del data[at : at + draw(st.integers(1, 8))]
        elif what == 3:
            data[at:at] = draw(st.binary(max_size=8))
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


labels = st.one_of(st.sampled_from([b"a", b"example", b"A", b"c", b"in-addr"]), st.binary(min_size=1, max_size=63))


@st.composite
def wire_names(draw: st.DrawFn) -> bytes:
    parts = draw(st.lists(labels, max_size=draw(st.sampled_from([3, 130]))))
    name = b"".join(bytes([len(part)]) + part for part in parts)
    return name + draw(st.sampled_from([b"\0", b"\0", b"\0", b"\xc0\x0c", b"\xc0\x10", b"\xc0\x00", b""]))


@st.composite
def records(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(TYPES))
    data = draw(st.one_of(st.binary(max_size=30), wire_names(), st.just(b"\0\0" + bytes(20))))
    owner = draw(st.one_of(wire_names(), st.sampled_from([m.TO_QUESTION, b"\0"])))
    return m.record(kind, data[:1000], draw(st.integers(0, 2**32 - 1)), owner, draw(st.sampled_from([1, 3, 1232])))


@st.composite
def structured(draw: st.DrawFn) -> bytes:
    """A message of valid parts, but not where or how often they should be."""
    sections = [draw(st.lists(records(), max_size=3)) for _ in range(3)]
    counts = [len(section) for section in sections]
    if draw(st.integers(0, 5)) == 0:
        counts[draw(st.integers(0, 2))] = draw(st.sampled_from([0, 1, 5, 4096, 65535]))
    names = st.one_of(wire_names(), st.sampled_from(NAMES).map(m.name))
    asked = [
        m.question(draw(names), draw(st.sampled_from(TYPES)), draw(st.sampled_from([1, 1, 1, 3, 255])))
        for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2])))
    ]
    flags = draw(st.one_of(st.sampled_from([m.RD, m.QR | m.RA, m.QR | m.RA | 3]), st.integers(0, 0xFFFF)))
    return m.header(len(asked), *counts, flags) + b"".join((*asked, *sum(sections, [])))  # noqa: RUF017


messages = st.one_of(
    st.binary(max_size=600), mutated(), structured(), st.binary(max_size=80).map(lambda b: REAL[0][:12] + b)
)


@st.composite
def proper_queries(draw: st.DrawFn) -> bytes:
    parts = draw(st.lists(labels, max_size=draw(st.sampled_from([4, 127]))))
    whole = b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    name = whole if len(whole) < 256 else m.name(draw(st.sampled_from(NAMES)))
    options = b"".join(
        m.option(code, data)
        for code, data in draw(st.lists(st.tuples(st.just(65001), st.binary(max_size=9)), max_size=3))
    )
    size = draw(st.sampled_from([0, 512, 1232, 4096, 65535]))
    extra = draw(st.sampled_from([(), (m.opt(options, size, 0, draw(st.sampled_from([0, m.DO]))),)]))
    kind = draw(st.sampled_from([m.A, m.AAAA, m.TXT, m.PTR, m.HTTPS, m.ANY, 65280]))
    flags = draw(st.sampled_from([0, m.RD, m.RD | m.CD, m.RD | m.AD, 0x7FF]))
    return m.query(name, kind, *extra, klass=draw(st.sampled_from([1, 1, 1, 3])), flags=flags)


def responder() -> Responder:
    """A responder whose cache holds responses of every kind."""
    made = Responder(SETTINGS, ZONE, Cache(100, 60))
    made.routes = Routes((Server("192.0.2.53"),), SETTINGS.domain_servers)
    made.server_statistics = lambda: ["192.0.2.53#53 1 0", "fe80::1%ü#53 1 0", "x" * 300] * 400
    for data in REAL:
        with contextlib.suppress(Malformed):
            answer = parse_response(data)
            for wants in (0, m.DO, m.CD):
                made.cache.put((answer.name, answer.type, 1, wants), entry_of(answer, 0.0, 60, 0, True))
    made.cache.put((m.name("plain"), m.TXT, 1, 0), failure(0.0))
    return made


RESPONDER = responder()


def test_dns_module_is_dnspython() -> None:
    """The folder `dns/` of this repository must not hide it."""
    assert Path(dns.message.__file__).parent != Path(message.__file__).parent
    assert dns.message.Message.__module__ == "dns.message"
    assert udpwatch.__name__ == "udpwatch"


# ---- only Malformed ----


@given(messages)
@fuzz
def test_parse_query_raises_only_malformed(data: bytes) -> None:
    steps = Steps(len(data))
    try:
        query = parse_query(data, steps)
    except Malformed as error:
        assert error.reason in message.REASONS
    else:
        assert len(query.name) <= 255
        name_to_text(query.name)
    assert steps.taken + steps.jumps <= len(data) + 1


@given(messages)
@fuzz
def test_parse_response_raises_only_malformed(data: bytes) -> None:
    with contextlib.suppress(Malformed):
        all_of(data)
    if len(data) > 12:  # the same as an answer
        with contextlib.suppress(Malformed):
            all_of(data[:2] + bytes([data[2] | 0x80]) + data[3:])


def all_of(data: bytes) -> message.Response:
    """What the forwarder and the log do with a response."""
    answer = parse_response(data)
    assert 12 < answer.body_end <= len(data)
    entry = entry_of(answer, 0.0, 60, 0, True)
    assert all(0 <= at <= len(entry.body) - 4 for at in entry.ttls)
    assert sum(entry.counts) == len(entry.ttls)
    assert 0 <= entry.expires <= MAX_TTL
    assert len(entry.aged(7.5, False)) == len(entry.body)
    rebinds(SETTINGS, answer)
    for record in answer.records:
        for read, at in ((message.owner, record.start), (message.rdata_name, record.owner_end)):
            with contextlib.suppress(Malformed):
                assert len(read(answer, at)) <= 255
    return answer


@given(st.binary(max_size=400), st.integers(0, 420))
@fuzz
def test_read_name_raises_only_malformed(data: bytes, at: int) -> None:
    steps = Steps(len(data))
    for read in (read_name, message.skip_name):
        with contextlib.suppress(Malformed):
            read(data, at, steps)
    with contextlib.suppress(Malformed):
        assert name_from_text(name_to_text(read_name(data, at, steps))) == read_name(data, at, steps)


@given(messages, st.booleans())
@fuzz
def test_responder_never_raises(data: bytes, tcp: bool) -> None:
    found = RESPONDER.respond(data, 1.0, tcp)
    log = QueryLog(True)
    if isinstance(found, Reply | Forward):
        log.log_query(found, "192.0.2.1", 5353)
    if isinstance(found, Reply):
        assert found.data[:2] == data[:2]
        assert len(found.data) <= (65_535 if tcp else 1232)
        if found.rcode not in (0, 3):
            assert len(found.data) <= len(data)
        if found.until > 1.0:
            again = RESPONDER.respond(data, min(found.until - 1e-6, 1e9), tcp)
            assert isinstance(again, Reply)
            assert again.data == found.data, "until then the same query gets the same response"


# ---- agreement with dnspython ----


@given(st.one_of(mutated(), structured(), proper_queries()))
@fuzz
def test_queries_are_parsed_as_by_dnspython(data: bytes) -> None:
    try:
        theirs = dns.message.from_wire(data)
    except Exception:  # of any kind
        return
    plain = len(data) >= 12 and not theirs.flags & dns.flags.QR and theirs.opcode() == dns.opcode.QUERY
    if not plain or m.counts_of(data)[:3] != (1, 0, 0) or data[12] >= 0xC0:
        return
    try:
        ours = parse_query(data)
    except Malformed as error:
        # dnspython takes OPT with any owner, and pointers in the question that lead into the header.
        assert error.reason in ("opt", "name"), error
        return
    question = theirs.question[0]
    assert ours.id == theirs.id
    assert ours.name == lower(question.name.to_wire())
    assert (ours.type, ours.klass) == (question.rdtype, question.rdclass)
    assert (ours.edns is None) == (theirs.edns < 0)
    if ours.edns:
        assert (ours.edns.version, ours.edns.udp_bytes) == (theirs.edns, theirs.payload)
        assert ours.edns.dnssec_ok == bool(theirs.ednsflags & dns.flags.DO)


@given(proper_queries(), st.booleans())
@fuzz
def test_dnspython_parses_our_responses(data: bytes, tcp: bool) -> None:
    ours = parse_query(data)  # raises nothing
    found = RESPONDER.respond(data, 1.5, tcp)
    assert not isinstance(found, Drop)
    if isinstance(found, Forward):
        found = RESPONDER.refuse(found.query, 2)
    theirs = dns.message.from_wire(found.data, raise_on_truncation=False)
    assert theirs.id == ours.id
    assert theirs.rcode() == found.rcode
    assert theirs.question[0].name.to_wire() == ours.question[:-4]
    assert (theirs.edns >= 0) == (ours.edns is not None)
    sent = dns.message.from_wire(data)
    assert sent.is_response(theirs)


@given(st.one_of(structured(), mutated()), st.sampled_from([m.A, m.AAAA, m.PTR]), st.sampled_from([512, 1232, 65535]))
@fuzz
def test_dnspython_parses_forwarded_responses(data: bytes, kind: int, most: int) -> None:
    """If it could parse what was received: records are forwarded unchanged."""
    data = data[:2] + bytes([data[2] | 0x80]) + data[3:] if len(data) > 2 else data
    try:
        answer = parse_response(data)
        before = dns.message.from_wire(data, raise_on_truncation=False)
    except Exception:
        return
    if (
        answer.rcode > 15
        or before.opcode() != dns.opcode.QUERY
        or answer.klass != m.IN
        or any(record.type in (m.OPT, 250) for record in answer.records)
        or not _same_names_with_other_ttls(data, answer, before)
    ):
        return
    wanted = answer.question[:-4].swapcase() if answer.question[:-4].isalnum() else answer.question[:-4]
    query = parse_query(m.query(wanted, answer.type, m.opt(size=most)))
    for now, stale in ((0.0, False), (20.5, False), (9e9, True)):
        reply = from_entry(query, entry_of(answer, 0.0, 60, 0, True), most, now, "stale" if stale else "cache")
        after = dns.message.from_wire(reply.data, raise_on_truncation=False)
        assert after.rcode() == before.rcode() or before.edns >= 0
        if not after.flags & dns.flags.TC and not answer.truncated:
            assert [r.name for r in after.answer] == [r.name for r in before.answer]


def _same_names_with_other_ttls(data: bytes, answer: message.Response, before: dns.message.Message) -> bool:
    """Whether no name points into a TTL: such a name changes when TTLs count down."""
    for ttl in (0, 30, 0xFFFF):
        changed = bytearray(data)
        for record in answer.records:
            struct.pack_into("!I", changed, record.owner_end + 4, ttl)
        try:
            after = dns.message.from_wire(bytes(changed), raise_on_truncation=False)
        except dns.exception.DNSException:
            return False
        if [r.name for r in after.answer] != [r.name for r in before.answer]:
            return False
    return True


@pytest.mark.parametrize("size", [13, 40, 300])
def test_errors_are_valid_messages(size: int) -> None:
    for rcode in (1, 4):
        read = dns.message.from_wire(message.build_error(bytes(each & 0xFF for each in range(size)), rcode))
        assert read.rcode() == rcode


# ---- malicious messages: steps, not seconds ----

SIZES = [512, 1_232, 4_096, 65_535]
LAST = 0x3FFF  # the highest offset that a pointer can hold


def pointer(at: int) -> bytes:
    return struct.pack("!H", 0xC000 | min(at, LAST))


def fill(head: bytes, size: int, make: str) -> tuple[bytes, int]:
    """As many records as fit, each of which makes the next one's name more expensive; and their number."""
    data, previous, number = bytearray(head), 12, 0
    while True:
        at = len(data)
        if make == "pointers":  # a name is a pointer to the name before
            each = m.record(m.A, bytes(4), 1, pointer(previous))
            previous = min(at, LAST)
        elif make == "labels":  # a label, then the name before
            each = m.record(m.PTR, b"\x01x" + pointer(previous), 1, b"\x01y" + pointer(previous))
            previous = at if at <= LAST and number % 120 else previous
        elif make == "data":  # the chain is in RDATA, and all that follows starts at its end
            if number == 0:
                chain = bytearray()
                start = at + 12
                for step in range(min((size - at) // 2 - 12, 8_000) // 2):
                    chain += pointer(start + 2 * step - 2 if step else 12)
                each = m.record(m.TXT, bytes(chain), 1)
                previous = min(start + len(chain) - 2, LAST - LAST % 2)
            else:
                each = m.record(m.PTR, pointer(previous), 1, pointer(previous))
        elif make == "long":  # every name is the longest
            each = m.record(m.PTR, m.TO_QUESTION, 1, b"\xc0\x0c")
        else:  # no pointers: labels of one octet
            each = m.record(m.A, bytes(4), 1, b"\x01z" * 127 + b"\0")
        if at + len(each) > size:
            return bytes(data), number
        data += each
        number += 1


def bomb(size: int, make: str, response: bool) -> bytes:
    asked = m.question(b"\x01q" * 120 + b"\0" if make == "long" else "q.example", m.PTR)
    data, number = fill(m.header() + asked, size, make)
    counts = (number, 0, 0) if response else (0, 0, number)
    return m.header(1, *counts, (m.QR if response else 0) | m.RD) + data[12:]


MAKES = ["pointers", "labels", "data", "long", "plain"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", MAKES)
def test_malicious_query_costs_one_step_per_octet(size: int, make: str) -> None:
    data, steps = bomb(size, make, False), Steps(size)
    assert size * 0.4 < len(data) <= size
    with contextlib.suppress(Malformed):
        parse_query(data, steps)
    assert steps.taken + steps.jumps <= len(data)


@pytest.mark.parametrize("size", SIZES)
def test_pointer_in_the_question_is_rejected_at_once(size: int) -> None:
    """The message that costs dnslib 46 s."""
    chain = b"".join(pointer(at) for at in range(12, size - 8, 2))
    for flags in (0, m.QR):
        data, steps = m.header(flags=flags) + chain + b"\0\0\1\0\1", Steps(size)
        with pytest.raises(Malformed):
            parse_response(data) if flags else parse_query(data, steps)
        assert steps.taken + steps.jumps <= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", MAKES)
def test_malicious_response_costs_a_few_steps_per_octet(size: int, make: str) -> None:
    """Everything the responder does with it: parse, cache, and log each name."""
    data = bomb(size, make, True)
    try:
        answer = parse_response(data)
    except Malformed:
        return  # too many records
    entry_of(answer, 0.0, 60, 0, True)
    for record in answer.records:
        for read, at in ((message.owner, record.start), (message.rdata_name, record.owner_end)):
            with contextlib.suppress(Malformed):
                read(answer, at)
    steps = answer.steps.taken + answer.steps.jumps
    # Parsing: one step per octet; then the budget for names, with at most one jump per step, and after its end one step
    # per name.
    most = (
        len(data) + 2 * min(message.NAME_STEPS_PER_OCTET * len(data), message.MAX_NAME_STEPS) + 4 * len(answer.records)
    )
    assert steps <= most <= 10 * len(data)


def test_real_responses_are_within_the_budget() -> None:
    """The most expensive real names are those of IPv6 reverse lookups; also an alias with as many addresses as fit."""
    reverse = ".".join("0" * 32) + ".ip6.arpa"
    names = [m.record(m.PTR, m.name(f"host-{each}.example.org"), 60) for each in range(500)]
    answer = parse_response(m.response(reverse, m.PTR, tuple(names)))
    for record in answer.records:
        assert message.owner(answer, record.start) == m.name(reverse)
        assert message.rdata_name(answer, record.owner_end).endswith(m.name("example.org"))
    alias = m.record(m.CNAME, m.name("a.long.chain.of.names.example.org"), 60)
    at = 12 + len(m.question("www.example")) + 12
    address = m.record(m.A, bytes(4), 50, pointer(at))
    head = len(m.response("www.example", m.A, (alias,)))
    data = m.response("www.example", m.A, (alias, *[address] * ((65_535 - head) // len(address))))
    answer = parse_response(data)
    assert (len(data) > 65_500, len(answer.records) > 4_000) == (True, True)
    assert entry_of(answer, 0.0, 0, 0, True).expires == 50.0
    assert answer.steps.taken + answer.steps.jumps <= 2 * len(answer.records), "linear, two steps each"


def test_number_of_records_is_bounded() -> None:
    """With the smallest records, more than MAX_RECORDS fit into a message."""
    smallest = m.record(m.A, b"", 50, b"\0")
    assert len(parse_response(m.response("q", m.A, (smallest,) * message.MAX_RECORDS)).records) == message.MAX_RECORDS
    data = m.response("q", m.A, (smallest,) * (message.MAX_RECORDS + 1))
    assert len(data) <= 65_535
    with pytest.raises(Malformed):
        parse_response(data)


def test_headless_service_with_many_pods() -> None:
    """A headless Service of Kubernetes: an SRV record and an address per pod. It is cached, and complete over TCP."""
    name, pods = "_http._tcp.web.default.svc.cluster.local", [f"10-0-{n >> 8}-{n & 255}" for n in range(700)]
    owners = [m.name(pod)[:-1] + pointer(12 + 11) for pod in pods]  # below web.default.svc.cluster.local
    records = tuple(m.record(m.SRV, struct.pack("!3H", 0, 1, 80) + owner, 30) for owner in owners)
    glue = tuple(m.record(m.A, bytes((10, 0, n >> 8, n & 255)), 30, owner) for n, owner in enumerate(owners))
    answer = parse_response(m.response(name, m.SRV, records, (), glue))
    entry = entry_of(answer, 0.0, 0, 0, True)
    assert (entry.counts, entry.expires) == ((700, 0, 700), 30.0)
    query = parse_query(m.query(name, m.SRV, m.opt()))
    whole = dns.message.from_wire(from_entry(query, entry, 65_535, 10.0, "cache").data)
    assert {rrset.ttl for rrset in (*whole.answer, *whole.additional)} == {20}
    assert (len(whole.answer[0]), len(whole.additional)) == (700, 700)
    assert m.flags_of(from_entry(query, entry, 1232, 10.0, "cache").data) & m.TC


def test_random_messages_of_every_size() -> None:
    """Without hypothesis, which prefers small ones."""
    draw = random.Random(4)  # noqa: S311
    for _ in range(ROUNDS // 4):
        data = bytearray(draw.randbytes(draw.choice((64, 512, 4096))))
        data[2:12] = bomb(512, "labels", bool(draw.getrandbits(1)))[2:12]
        for _ in range(20):
            data[draw.randrange(len(data))] = draw.choice(ODD)
        RESPONDER.respond(bytes(data), 1.0)
        with contextlib.suppress(Malformed):
            all_of(bytes(data))


def test_every_response_has_metric_labels() -> None:
    metrics = Metrics()
    for reason in message.REASONS:
        metrics.malformed[reason][0] += 1
    assert list(DnsCollector(metrics, RESPONDER.cache, lambda: 0).collect())
