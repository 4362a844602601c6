"""bpf/records.h and agent/kernel/records.py agree: the test compiles the header and compares."""

from __future__ import annotations

import ctypes
import ipaddress
import json
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import BPF

from udpwatch.agent.kernel import records
from udpwatch.agent.kernel.records import (
    CandidateRecord,
    ConversationRecord,
    ConversationSet,
    DumpedRequest,
    EventRecord,
    FindingKey,
    FindingValue,
    HealCounts,
    LocalKey,
    ReportedKey,
    RequestKey,
    RequestRecord,
    SelfTest,
    ServerCounts,
    ServerKey,
    ServerValue,
    SocketOwner,
    SocketRecord,
    StatsRecord,
    Tenant,
    Waiting,
)
from udpwatch.agent.model import REFUSALS, Cause, Conversation, Counters, Tuple, Verdict

MIRRORS: dict[str, type[ctypes.Structure]] = {
    "struct tenant": Tenant,
    "struct conversation": ConversationRecord,
    "struct conversation_set": ConversationSet,
    "struct finding_key": FindingKey,
    "struct finding": FindingValue,
    "struct event": EventRecord,
    "struct reported_key": ReportedKey,
    "struct request_key": RequestKey,
    "struct request": RequestRecord,
    "struct dumped_request": DumpedRequest,
    "struct self_test": SelfTest,
    "struct candidate": CandidateRecord,
    "struct stats": StatsRecord,
    "struct server_key": ServerKey,
    "struct server": ServerValue,
    "struct server_counts": ServerCounts,
    "struct waiting": Waiting,
    "struct heal_counts": HealCounts,
    "struct local_key": LocalKey,
    "struct socket_owner": SocketOwner,
    "struct socket_record": SocketRecord,
}


ENUM_VALUES = [
    *("VERDICT_HEALED", "HEAL_UNSET", "HEAL_DRY_RUN", "HEAL_ON", "HEAL_NEVER", "HEAL_BY_SLOT", "REFUSALS"),
    *("REFUSED_SEVERAL", "REFUSED_GROUP", "REFUSED_LINK", "REFUSED_NOT_LOCAL", "REFUSED_TRANSPARENT"),
    *("VERDICT_NEW", "VERDICT_UNTRACKED", "VERDICT_UNKNOWN", "CAUSE_KERNEL_CHOSEN", "CAUSE_EXPLICIT"),
    *("CAUSE_CONNECTED", "CAUSE_UNKNOWN", "CAUSE_FORWARDED", "PKTINFO_UNKNOWN", "PKTINFO_NONE", "PKTINFO_PASSED"),
    *("SETTLED_NONE", "SETTLED_WRONG", "SETTLED_ANSWERED", "SETTLED_ASK", "SETTLED_UNDECIDED"),
    *("TUPLE_LEN", "COMM_LEN", "WAYS", "NO_SERVER", "OTHER_SERVERS", "FIRST_SLOT"),
]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Compile the header; returns "struct x" -> size, "struct x.member" -> offset, and enum values."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("layout")
    lines = []
    for name, mirror in MIRRORS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field in mirror._fields_:
            lines.append(f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));')
    for value in ENUM_VALUES:
        lines.append(f'printf("{value} %d\\n", {value});')
    source = folder / "layout.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <linux/types.h>\n#include <records.h>\n"
        "int main(void) {" + "\n".join(lines) + "return 0; }"
    )
    subprocess.run(["gcc", f"-I{BPF}", "-o", folder / "layout", source], check=True)
    output = subprocess.run([folder / "layout"], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, _, number in (line.rpartition(" ") for line in output.splitlines())}


@pytest.mark.parametrize("name", MIRRORS)
def test_sizes_and_offsets_match_the_header(layout: dict[str, int], name: str) -> None:
    mirror = MIRRORS[name]
    assert ctypes.sizeof(mirror) == layout[name]
    for field in mirror._fields_:
        assert getattr(mirror, field[0]).offset == layout[f"{name}.{field[0]}"], field[0]


def test_enums_match_the_header(layout: dict[str, int]) -> None:
    for number, verdict in records.VERDICTS.items():
        assert layout[f"VERDICT_{verdict.name}"] == number
    for number, cause in records.CAUSES.items():
        assert layout[f"CAUSE_{cause.name}"] == number
    modes = ("HEAL_UNSET", "HEAL_DRY_RUN", "HEAL_ON", "HEAL_NEVER", "HEAL_BY_SLOT")
    assert [layout[name] for name in modes] == [getattr(records, name) for name in modes]
    refusals = ["REFUSED_SEVERAL", "REFUSED_GROUP", "REFUSED_LINK", "REFUSED_NOT_LOCAL", "REFUSED_TRANSPARENT"]
    assert [layout[name] for name in refusals] == list(range(len(REFUSALS)))
    assert [name[8:].lower()[:4] for name in refusals] == [reason.replace("-", "_")[:4] for reason in REFUSALS]
    assert layout["REFUSALS"] == len(REFUSALS)
    assert layout["TUPLE_LEN"] == records.TUPLE_LEN
    assert layout["COMM_LEN"] == records.COMM_LEN


@given(st.ip_addresses())
def test_addresses_round_trip(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    text = str(address)
    decoded = ipaddress.ip_address(records.decode_address(records.encode_address(text)))
    if address.version == 6 and address.ipv4_mapped:
        assert decoded == address.ipv4_mapped
    else:
        assert decoded == address


def test_finding_is_decoded() -> None:
    key = FindingKey(netns=7, cgroup=9, comm=b"dns\x1b[31m\xff", port=53, verdict=1, cause=1, family=2)
    key.expected[:] = records.encode_address("172.16.13.13")
    key.actual[:] = records.encode_address("172.17.0.1")
    finding, conversation = records.decode_finding_key(bytes(key))
    assert (finding.expected, finding.actual, finding.port, finding.family) == ("172.16.13.13", "172.17.0.1", 53, 4)
    assert (finding.verdict, finding.cause) == (Verdict.NEW, Cause.KERNEL_CHOSEN)
    assert finding.process == "dns\\x1b[31m\\xff"
    assert conversation is None


def test_suspected_reply_has_its_flow() -> None:
    key = FindingKey(port=53, verdict=3, cause=4, family=10)
    key.conversation.peer[:] = records.encode_address("fd00::2")
    key.conversation.peer_port, key.conversation.source_port = 40000, 54
    finding, conversation = records.decode_finding_key(bytes(key))
    assert finding.verdict is Verdict.UNKNOWN
    assert conversation == Conversation("fd00::2", 40000, 54)


def test_numbers_of_another_version_count_as_wrong_replies_of_unknown_cause() -> None:
    finding, conversation = records.decode_finding_key(bytes(FindingKey(verdict=99, cause=99, family=2)))
    assert (finding.verdict, finding.cause, conversation) == (Verdict.NEW, Cause.UNKNOWN, None)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            "ac1100010000000000000000000000005ddd0200ac11000300000000000000000000000082351100",
            Tuple("172.17.0.1", 24029, "172.17.0.3", 33333),
        ),
        (
            "fd00001700000000000000000000000100350a00fd000017000000000000000000000003c00f1100",
            Tuple("fd00:17::1", 53, "fd00:17::3", 49167),
        ),
        ("00" * 40, None),
        ("ff" * 40, None),
    ],
)
def test_conntrack_tuple_is_decoded(raw: str, expected: Tuple | None) -> None:
    """The bytes are as the kernel has them in memory on a little-endian machine."""
    assert records.decode_tuple(bytes.fromhex(raw)) == expected


def test_counters_are_summed_over_cpus() -> None:
    one, other = StatsRecord(flows=3, wrong=1), StatsRecord(flows=4, ring_full=2)
    assert records.decode_counters(bytes(one) + bytes(other)) == Counters(flows=7, wrong=1, ring_full=2)
    assert records.decode_counters(b"") == Counters()


def test_layout_of_another_version_is_read_by_the_names_of_members() -> None:
    described = json.loads(json.dumps(records.layout()))
    other = described["finding"]
    assert records.Layout(described).own("finding", bytes(range(40)) + bytes(0)) == bytes(range(40))
    # The other version's struct begins with a member of its own, has a shorter `last`, and lacks `began`.
    members = {"novelty": [0, 8], "tgid": [8, 4], "last": [12, 4], "count": [16, 8]}
    layout = records.Layout(described | {"finding": {"size": 24, "members": members}})
    raw = struct.pack("=QIIQ", 1, 77, 5, 1_000) + struct.pack("=QIIQ", 2, 78, 6, 2_000)
    own = layout.own("finding", raw)
    assert len(own) == 2 * records.FINDING_BYTES
    assert records.decode_finding(own) == records.CountedFinding(1_000, 5, 77, 0)
    assert records.decode_finding(own[records.FINDING_BYTES :]) == records.CountedFinding(2_000, 6, 78, 0)
    assert layout.size("finding") == 24 and not layout.is_own("finding") and layout.is_own("event")
    assert other["size"] == records.FINDING_BYTES


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda each: st.lists(each) | st.dictionaries(st.text(), each))
)
def test_invalid_layouts_are_refused(described: object) -> None:
    for wrong in ({"finding": described}, records.layout() | {"finding": described}):
        with pytest.raises((LookupError, TypeError, ValueError)):
            records.Layout(wrong)


def test_layout_with_members_outside_of_the_struct_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter than its members"):
        records.Layout(records.layout() | {"finding": {"size": 8, "members": {"last": [4, 8]}}})
