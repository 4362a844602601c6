"""Read the firewall rules of a network namespace that concern one UDP port, with their counters.

nft(8) and iptables-save(8) are run where they exist. iptables' own tables also appear in nft's list; there, only
iptables-save's reading counts.

Rules
1. A rule concerns the port if it names the port, or if it names neither a port nor another protocol and drops.
2. What a rule tests beside that (addresses, devices, sets) is not evaluated; whether it matched is for its counter to
   tell.
3. A tenant may have loaded any number of rules: reading ends after READ_SECONDS or MAX_BYTES.
4. Names of tables and chains are a tenant's. A command to copy contains none but plain words.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_BYTES = 16 << 20
READ_SECONDS = 5.0
_MAX_ERROR_BYTES = 4_096
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Effect(StrEnum):
    """What a rule does to a datagram."""

    DROP = "drop"
    REJECT = "reject"
    DNAT = "dnat"  # sends it to another address or port


@dataclass(frozen=True, slots=True)
class Rule:
    """A firewall rule, or the policy of a chain."""

    place: str  # e.g. "inet filter input"
    text: str  # in the firewall's own words
    effect: Effect
    replies: bool  # it matches the port as a source: the server's replies
    named: bool  # it names the port
    packets: int | None  # that it counted; None: it has no counter
    to: str = ""  # of DNAT: address, port or both
    key: str = ""  # identifies it in two readings
    by_iptables: bool = False

    @property
    def chain(self) -> tuple[str, ...]:
        """Family, table and chain; () if they are no plain words, which a shell and nft take as they are."""
        words = tuple(self.place.split(" "))
        return words if len(words) == 3 and all(map(_PLAIN.fullmatch, words)) else ()

    @property
    def is_policy(self) -> bool:
        """Whether it is what the chain does with packets that no rule decides on."""
        return self.text.startswith("policy ")


@dataclass(frozen=True, slots=True)
class Firewall:
    """The rules of one namespace."""

    rules: tuple[Rule, ...]
    unread: tuple[str, ...] = ()  # what could not be read, and why


def read(port: int, seconds: float = READ_SECONDS) -> Firewall:
    """Return the rules of the namespace of the calling thread that concern the port.

    ``seconds``: that reading may take.
    """
    unread = []
    end = time.monotonic() + seconds
    saved: dict[str, str] = {}
    for command in (("iptables-save", "-c"), ("ip6tables-save", "-c"), ("nft", "-j", "list", "ruleset")):
        text, reason = _run(command, max(end - time.monotonic(), 0.0))
        saved[command[0]] = text
        if reason:
            unread.append(reason)
    rules = [
        *iptables_rules(saved["iptables-save"], "ip", port),
        *iptables_rules(saved["ip6tables-save"], "ip6", port),
    ]
    try:
        rules += nft_rules(json.loads(saved["nft"] or "{}"), port, bool(saved["iptables-save"]))
    except ValueError:
        unread.append("nft: it printed no JSON")
    return Firewall(tuple(rules), tuple(unread))


def _run(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Return the output, and why there is none."""
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as run:
            assert run.stdout and run.stderr
            limit = threading.Timer(seconds, run.kill)
            limit.start()
            try:
                output = run.stdout.read(MAX_BYTES + 1)
                if len(output) > MAX_BYTES:
                    run.kill()
                errors = run.stderr.read(_MAX_ERROR_BYTES).decode(errors="replace").strip().splitlines()
            finally:
                limit.cancel()
    except FileNotFoundError:
        return "", "nft: not installed" if command[0] == "nft" else ""
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    if len(output) > MAX_BYTES:
        return "", f"{command[0]}: its list is longer than {MAX_BYTES >> 20} MB"
    if run.returncode == -signal.SIGKILL:
        return "", f"{command[0]}: its list takes longer than {seconds:.1f} s"
    if run.returncode:
        return "", f"{command[0]}: {errors[0] if errors else f'exit status {run.returncode}'}"
    return output.decode(errors="replace"), ""


# nft ---------------------------------------------------------------------------------------------------------------


def nft_rules(ruleset: Mapping[str, Any], port: int, iptables_read: bool) -> Iterator[Rule]:
    """Yield the rules of `nft -j list ruleset` that concern the port; without iptables' tables if they were read."""
    for item in ruleset.get("nftables", ()):
        own = item.get("rule") or item.get("chain")
        if not own:
            continue
        chain = own.get("chain") or own.get("name", "")
        family, table = own.get("family", ""), own.get("table", "")
        if iptables_read and family in ("ip", "ip6") and table in ("filter", "nat", "mangle", "raw", "security"):
            continue
        place = f"{family} {table} {chain}"
        if "chain" in item:
            if own.get("policy") == "drop" and own.get("hook") in ("ingress", "prerouting", "input", "output"):
                replies = own["hook"] == "output"
                yield Rule(place, "policy drop", Effect.DROP, replies, False, None, key=place)
        else:
            yield from _nft_rule(own, place, port)


def _nft_rule(rule: Mapping[str, Any], place: str, port: int) -> Iterator[Rule]:
    named = replies = False
    packets = effect = None
    to, words = "", []
    for part in rule.get("expr", ()):
        if "match" in part:
            hit, reply = _nft_match(part["match"], port)
            if hit is False:
                return
            named, replies = named or bool(hit), replies or reply
            words.append(_nft_words(part["match"]))
        elif "counter" in part:
            packets = part["counter"].get("packets") if isinstance(part["counter"], dict) else None
        for name, kind in (("drop", Effect.DROP), ("reject", Effect.REJECT), ("dnat", Effect.DNAT)):
            if name in part:
                effect = kind
                to = _nft_target(part[name])
        if "redirect" in part:
            effect, to = Effect.DNAT, _nft_target(part["redirect"])
    if effect is None or (effect is Effect.DNAT and not named):
        return
    verdict = f"dnat to {to}" if effect is Effect.DNAT else str(effect)
    text = " ".join([*words, *(["counter"] if packets is not None else []), verdict])
    yield Rule(place, text, effect, replies, named, packets, to, f"{place} {rule.get('handle')}")


def _nft_match(match: Mapping[str, Any], port: int) -> tuple[bool | None, bool]:
    """Return (True: names the port; False: excludes UDP or the port; None: something else, whether it is a reply's)."""
    left, values = match.get("left", {}), _nft_values(match.get("right"))
    equal = match.get("op") in ("==", "in")
    match left:
        case {"meta": {"key": "l4proto"}} | {"payload": {"field": "protocol" | "nexthdr"}}:
            return (None if any(each in ("udp", 17) for each in values) == equal else False), False
        case {"payload": {"protocol": "udp" | "th", "field": ("dport" | "sport") as side}}:
            reply = side == "sport"
            if any(isinstance(each, str) and each.startswith("@") for each in values):  # a named set
                return None, reply
            return any(_nft_contains(each, port) for each in values) == equal, reply
        case {"payload": {"protocol": "ip" | "ip6" | "ether" | "vlan" | "udp" | "th"}}:
            return None, False
        case {"payload": _}:
            return False, False  # another protocol: tcp flags, icmp type
    return None, False


def _nft_values(right: Any) -> list[Any]:
    if isinstance(right, dict) and "set" in right:
        return list(right["set"])
    return list(right) if isinstance(right, list) else [right]


def _nft_contains(value: Any, port: int) -> bool:
    if isinstance(value, dict):
        value = value.get("elem", {}).get("val", value) if "elem" in value else value
        if isinstance(value, dict) and "range" in value:
            low, high = value["range"]
            return isinstance(low, int) and isinstance(high, int) and low <= port <= high
    return bool(value == port)


def _nft_words(match: Mapping[str, Any]) -> str:
    left, right = match.get("left"), match.get("right")
    operator = "" if match.get("op") in ("==", "in") else f"{match.get('op')} "
    return f"{_nft_term(left)} {operator}{_nft_term(right)}"


def _nft_term(term: Any) -> str:
    """Write a term of nft's JSON about as nft(8) does."""
    match next(iter(term.items()), ("", None)) if isinstance(term, dict) else ("set", term):
        case "payload", {"protocol": protocol, "field": name}:
            text = f"{protocol} {name}"
        case ("meta" | "ct") as table, {"key": key}:
            text = str(key) if table == "meta" else f"ct {key}"
        case "range", [low, high]:
            text = f"{low}-{high}"
        case "prefix", {"addr": address, "len": length}:
            text = f"{address}/{length}"
        case "set", [*values]:
            text = f"{{ {', '.join(map(_nft_term, values))} }}"
        case "set", value:
            text = str(value)
        case _:
            text = "..."
    return text


def _nft_target(verdict: Any) -> str:
    if not isinstance(verdict, dict):
        return ""
    address, port = _nft_term(verdict.get("addr", "")), _nft_term(verdict.get("port", ""))
    return _target(address, port)


def _target(address: str, port: str) -> str:
    if not address:
        return f":{port}" if port else ""
    if not port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


# iptables ----------------------------------------------------------------------------------------------------------


def iptables_rules(saved: str, family: str, port: int) -> Iterator[Rule]:
    """Yield the rules of `iptables-save -c` that concern the port."""
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            chain, policy, counts = (*line[1:].split(), "", "", "")[:3]
            if policy == "DROP" and chain in ("INPUT", "PREROUTING", "OUTPUT"):
                packets = int(counts.strip("[]").partition(":")[0] or 0)
                place = f"{family} {table} {chain}"
                yield Rule(place, "policy DROP", Effect.DROP, chain == "OUTPUT", False, packets, "", place, True)
        elif line.startswith("["):
            yield from _iptables_rule(line, f"{family} {table}", port)


def _iptables_rule(line: str, place: str, port: int) -> Iterator[Rule]:
    counts, _, text = line.partition(" ")
    try:
        words = shlex.split(text)
    except ValueError:
        return
    named = replies = False
    negated = False
    options: dict[str, str] = {}
    for index, word in enumerate(words):
        value = words[index + 1] if index + 1 < len(words) else ""
        if word == "!":
            negated = True
            continue
        if word in ("-p", "--protocol") and (value not in ("udp", "17", "all")) != negated:
            return
        if word in ("--dport", "--dports", "--sport", "--sports", "--destination-port", "--source-port"):
            if _iptables_contains(value, port) == negated:
                return
            named, replies = True, replies or word.startswith("--s")
        if word.startswith("-"):
            options[word] = value
            negated = False
    effects = {"DROP": Effect.DROP, "REJECT": Effect.REJECT, "DNAT": Effect.DNAT, "REDIRECT": Effect.DNAT}
    effect = effects.get(options.get("-j", ""))
    if effect is None or (effect is Effect.DNAT and not named):
        return
    to = options.get("--to-destination", "")
    if "--to-ports" in options:
        to = f":{options['--to-ports']}"
    packets = int(counts.strip("[]").partition(":")[0] or 0)
    yield Rule(f"{place} {options.get('-A', '')}", text, effect, replies, named, packets, to, f"{place} {text}", True)


def _iptables_contains(value: str, port: int) -> bool:
    for part in value.split(","):
        low, _, high = part.partition(":")
        if (low or "0").isdecimal() and (high or "0").isdecimal():
            first, last = int(low or 0), int(high or 65535) if ":" in part else int(low or 0)
            if first <= port <= last:
                return True
    return False
