"""Records that are alike are one item, and everything read from them is what one by one would give."""

from __future__ import annotations

import contextlib
import random
import struct
from typing import Any

import dns_messages as m
import pytest
from dns_bombs import BOMBS, filled

from udpwatch.dns import message
from udpwatch.dns.cache_entry import MAX_SOA, MAX_TTL, entry_of
from udpwatch.dns.cname import MAX_OWNERS, CnameLoop, follow
from udpwatch.dns.message import MAX_NAME_STEPS, MAX_RUN_TRIES, MAX_SINGLES, MAX_SKIP_STEPS, Malformed, parse_response
from udpwatch.dns.records import MAX_RUN_OWNER_BYTES, MIN_RUN

OWNERS = (m.TO_QUESTION, b"\0", m.name("w.example"), m.name("x" * 63 + ".example"))
LENGTHS = (1, 2, MIN_RUN - 1, MIN_RUN, MIN_RUN + 1, 100, 700)


def mixed(seed: int) -> tuple[bytes, list[list[bytes]]]:
    """A response with runs of random lengths in every section, and its records."""
    choose = random.Random(seed)  # noqa: S311
    sections: list[list[bytes]] = [[], [], []]
    lengths = [choose.choice(LENGTHS) for _ in range(MAX_RUN_TRIES)] + [1, 2, MIN_RUN - 1] * 4
    choose.shuffle(lengths)
    for section in sections:
        for _ in range(choose.randrange(6)):
            owner, kind, size = choose.choice(OWNERS), choose.choice((m.A, m.TXT)), choose.choice((0, 1, 4, 16))
            ttl = choose.choice((0, 60, MAX_TTL + 1, 1 << 31, None))
            for _ in range(lengths.pop()):
                own = choose.randrange(1 << 32) if ttl is None else ttl
                section.append(m.record(kind, choose.randbytes(size), own, owner))
    while sum(len(each) for section in sections for each in section) > 65_000 or sum(map(len, sections)) > 5000:
        max(sections, key=len).pop()
    return m.response("q.example", m.A, *(tuple(section) for section in sections)), sections


@pytest.mark.parametrize("seed", range(60))
def test_runs_are_read_as_records_one_by_one(seed: int) -> None:
    data, sections = mixed(seed)
    answer = parse_response(data)
    found = list(answer.records)
    assert [data[each.start : each.end] for each in found] == [each for section in sections for each in section]
    assert answer.counts == tuple(map(len, sections)) and len(answer.records) == len(found)
    for each in found:
        fixed = struct.unpack_from("!HHIH", data, each.owner_end)
        assert fixed == (each.type, each.klass, each.ttl, each.end - each.data) and each.data == each.owner_end + 10
    assert list(answer.records.ttl_offsets(5)) == [each.owner_end - 1 for each in found]


@pytest.mark.parametrize("seed", range(60))
def test_entry_of_runs_is_that_of_records_one_by_one(seed: int) -> None:
    data, _ = mixed(seed)
    answer = parse_response(data)
    low, high = 30, 3600
    entry = entry_of(answer, 0.0, 0, 0, True, cache_ttl=(low, high))
    seconds = [0 if each.ttl >> 31 else each.ttl for each in answer.records]
    kept = [int.from_bytes(entry.body[at : at + 4], "big") for at in entry.ttls]
    assert kept == [min(max(ttl, low), high) for ttl in seconds]
    start = 12 + len(answer.question)
    without = bytearray(data[start:])
    for at, ttl in zip(entry.ttls, kept, strict=True):
        struct.pack_into("!I", without, at, ttl)
    assert entry.body == without, "nothing but TTLs has changed"
    wanted = [
        ttl
        for each, ttl in zip(answer.records, seconds, strict=True)
        if each.section == 1 and each.type == m.A and message.owner(answer, each.start) == answer.name
    ]
    assert entry.expires == (min(max(min(wanted), low), high) if wanted else 0)


def test_run_ends_where_any_octet_of_owner_type_class_or_length_differs() -> None:
    first = m.record(m.A, b"abcd", 7)
    for at in (*range(6), 10, 11):
        other = bytearray(first)
        other[at] ^= 1 if at else 0xC0  # the owner becomes a label
        data = m.response("q.example", m.A, (first,) * 20 + (bytes(other),) * 5)
        with contextlib.suppress(Malformed):
            assert next(run[3] for run in parse_response(data).records.runs()) == 20, at


def test_many_addresses_are_one_run() -> None:
    """A headless Service with as many endpoints as fit into a response."""
    answer = parse_response(BOMBS["addresses"])
    assert len(answer.records) == 4094
    assert [run[3] for run in answer.records.runs()] == [4094]
    assert entry_of(answer, 0.0, 0, 0, True).expires == 60
    assert answer.steps.taken + answer.steps.jumps < 20


@pytest.mark.parametrize("name", BOMBS)
def test_malicious_response_costs_few_steps(name: str) -> None:
    """What is done for each item: runs, steps to skip and to read names, owners, SOA records."""
    try:
        answer = parse_response(BOMBS[name])
        with contextlib.suppress(CnameLoop):
            follow(answer)
        entry_of(answer, 0.0, 60, 0, True)
    except Malformed:
        return  # after as many steps; counted below for those that are read
    assert len(list(answer.records.runs())) <= MAX_SINGLES + MAX_RUN_TRIES
    columns = MAX_RUN_TRIES * (MAX_RUN_OWNER_BYTES + 6)
    most = MAX_SKIP_STEPS + MAX_SINGLES + columns + 2 * MAX_NAME_STEPS
    assert answer.steps.taken + answer.steps.jumps <= most < 17_000


@pytest.mark.parametrize(
    ("most", "make"),
    [
        (MAX_SINGLES, lambda number, at: m.record(m.TXT, bytes(number % 2), 60)),
        (MAX_OWNERS, lambda number, at: m.record(m.A, b"", 60, b"\2" + struct.pack("!H", number) + m.TO_QUESTION)),
        (MAX_SKIP_STEPS // 100, lambda number, at: m.record(m.A, bytes(number % 2), 60, b"\1a" * 99 + b"\0")),
    ],
    ids=["records", "owners", "labels"],
)
def test_bounds(most: int, make: Any) -> None:
    follow(parse_response(filled(make, most=most - 1)))
    with pytest.raises(Malformed):
        follow(parse_response(filled(make, most=most + 1)))


def test_owners_of_soa_records_are_read_a_few_times() -> None:
    """The one that applies counts only among the first."""
    other, right = m.soa(60, 60, m.name("z")), m.soa(60, 60, m.name("example"))
    for before, lifetime in ((MAX_SOA - 1, 60), (MAX_SOA, 0)):
        odd = tuple(other if each % 2 else m.soa(60, 60, m.name("zz")) for each in range(before))
        answer = parse_response(m.response("q.example", m.A, (), (*odd, right)))
        assert entry_of(answer, 0.0, 0, 0, True).expires == lifetime
