"""docs/limits.md against the code: each number that it names, and each bound that it must name."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import pytest
from repository import ROOT

PAGE = (ROOT / "docs/limits.md").read_text()
#: A bound: "- **NAME**: VALUE. EFFECT", "Counter: ...", "Code: ...", over several lines.
ITEMS = [" ".join(item.split()) for item in re.findall(r"^- \*\*.*\n(?:  .*\n)*", PAGE, re.MULTILINE)]
REFERENCE = re.compile(r"`((?:agent|dns)/[\w/]+\.py):([\w.]+)`")

#: What bounds no tenant's doing: formats, what files and settings of the operator's may hold, and the screen.
NOT_A_TENANTS = {
    "agent/client/audit_text.py:MAX_SENTENCES",
    "agent/client/audit_text.py:MAX_SERVERS",
    "agent/daemon/http.py:MAX_CLIENTS",
    "agent/attribution/container.py:MAX_DEPTH",
    "agent/attribution/container.py:MAX_PATHS",
    "agent/attribution/docker.py:MAX_CONTAINERS",
    "agent/attribution/docker.py:MAX_FILE_BYTES",
    "agent/attribution/pod.py:MAX_NAMES",
    "agent/attribution/process.py:MAX_PROCESSES",
    "agent/attribution/process.py:MAX_COMMAND_CHARACTERS",
    "agent/attribution/budget.py:MAX_TENANTS",
    "agent/attribution/runtime.py:MAX_ANCESTORS",
    "agent/attribution/runtime.py:MAX_ARGUMENTS_BYTES",
    "agent/attribution/runtime.py:MAX_CONTAINERS",
    "agent/heal/addresses.py:MAX_DATAGRAMS",
    "agent/heal/healer.py:MAX_ELSEWHERE",
    "agent/heal/modes.py:MAX_PORTS",
    "agent/heal/namespaces.py:MAX_REPORTED",
    "agent/kernel/loader_child.py:MAX_LOCAL",
    "agent/kernel/pins.py:MAX_MANIFEST",
    "agent/sources/conntrack.py:MAX_NAMESPACES",
    "agent/kernel/netns.py:MAX_ENTRIES",
    "agent/kernel/ledger.py:MAX_RECORD_BYTES",
    "agent/kernel/objects.py:MAX_FILES",
    "agent/kernel/objects.py:MAX_FILE_BYTES",
    "agent/sources/replay.py:MAX_EVENTS",
    "agent/sources/replay.py:MAX_LINE",
    "agent/sources/replay.py:MAX_PAUSE_SECONDS",
    "agent/sources/replay.py:MAX_SENDERS",
    "agent/sources/sensor.py:MAX_EVENTS",
    "agent/daemon/continuity.py:MAX_PAUSE_SECONDS",
    "agent/daemon/event_log.py:MAX_LINKS",
    *(
        f"dns/{name}"
        for name in (
            "cache_entry.py:MAX_NEGATIVE_TTL",
            "cache_entry.py:MAX_TTL",
            "options.py:MAX_DEPTH",
            "responder.py:MAX_STRINGS",
            "responder.py:MAX_UDP_BYTES",
            "resolvconf.py:MAX_NAMESERVERS",
            "resolvconf.py:MAX_RESOLV_BYTES",
            "values.py:MAX_CACHE_SIZE",
            "values.py:MAX_INTERFACE_BYTES",
            "values.py:MAX_SECONDS",
            "watch.py:MAX_PAUSE_SECONDS",
            "idn.py:MAX_TEXT",
            "libc.py:MAX_DATAGRAM_BYTES",
            "packet_loop.py:MAX_SLEEP_SECONDS",
            "names.py:MAX_LABEL_BYTES",
            "message.py:MAX_MESSAGE_BYTES",
            "records.py:MAX_RUN_OWNER_BYTES",
            "direct.py:MAX_ANSWERS",
            "names.py:MAX_NAME_BYTES",
            "names.py:MAX_ADDRESSES",
            "option_readers.py:MAX_SYNTH_PREFIX",
            "hosts_file.py:MAX_COMPLAINTS",
            "hosts_file.py:MAX_FILE_BYTES",
        )
    ),
    "agent/client/explain_text.py:MAX_ROWS",
}


def constants() -> Iterator[str]:
    """Find every module's MAX_... constants that bound what others can make the agent do."""
    for path in sorted([*ROOT.glob("agent/**/*.py"), *ROOT.glob("dns/*.py")]):
        name = str(path.relative_to(ROOT))
        if name.startswith("agent/client/top/"):
            continue
        for node in ast.parse(path.read_text()).body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                for each in target.elts if isinstance(target, ast.Tuple) else (target,):
                    if isinstance(each, ast.Name) and each.id.startswith("MAX_"):
                        yield f"{name}:{each.id}"


def value_of(path: str, name: str) -> float:
    module = importlib.import_module("udpwatch." + path.removesuffix(".py").replace("/", "."))
    owner, _, field = name.rpartition(".")
    if not owner:
        return float(getattr(module, name))
    kind = getattr(module, owner)
    assert is_dataclass(kind)
    (default,) = (each.default for each in fields(kind) if each.name == field)
    return float(default)


def spellings(value: float) -> set[str]:
    whole = int(value)
    words = {f"{value:g}", f"{value * 100:.0f} %"}
    if whole == value:
        words |= {f"{whole:,}", f"{whole >> 10} KB", f"{whole >> 20} MB"}
    return words | ({"one"} if whole == 1 else set())


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.split("**")[1])
def test_documented_values_match_the_code(item: str) -> None:
    parts = re.fullmatch(r"(.+?) Counter: (.+?) Code: (.+)", item)
    assert parts, item
    references = REFERENCE.findall(parts[3])
    assert references, item
    for path, name in references:
        value = value_of(path, name)
        found = any(re.search(rf"(?<![\d,.]){re.escape(word)}(?![,.]?\d)", parts[1]) for word in spellings(value))
        assert found, f"{path}:{name} is {value:g}, the item has none of {sorted(spellings(value))}"


def test_every_reference_is_part_of_an_item() -> None:
    assert len(REFERENCE.findall(PAGE)) == sum(len(REFERENCE.findall(item)) for item in ITEMS)


def test_each_bound_is_documented() -> None:
    named = {f"{path}:{name}" for path, name in REFERENCE.findall(PAGE)}
    missing = set(constants()) - named - NOT_A_TENANTS
    assert not missing


def test_exceptions_exist() -> None:
    assert set(constants()) >= NOT_A_TENANTS
