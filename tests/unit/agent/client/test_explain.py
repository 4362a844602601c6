"""`udpwatch explain`: three sentences with the addresses of the finding, and the fix for its server."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from golden import HEALED_ROW, ROW, compare

from udpwatch.agent.client.explain import advice, explanation, matching, remedy_advice, row_object, short_advice
from udpwatch.agent.client.explain_text import MAX_ROWS, remedy_text, rows_object, rows_text
from udpwatch.agent.client.heal_advice import heal_sentence
from udpwatch.agent.client.remedies import FILE, Code, codes, remedies, remedy_named, remedy_of
from udpwatch.agent.model import Cause, Healing, Row, Sender, Verdict

ESCAPE = "\x1b"
ROW_6 = replace(ROW, sender=Sender("dns", 7), port=53, expected="fd00:13::13", actual="fd00:17::1", family=6)


def of(process: str, executable: str = "") -> Row:
    return replace(ROW, sender=Sender(process, 7, executable))


@pytest.fixture
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_utc")
def test_golden_explain() -> None:
    rows = (
        ROW,
        replace(of("snmpd"), port=161, expected="fd00::2", actual="fd00::9", family=6, verdict="untracked", count=7),
        replace(of("iperf3"), port=5201, cause="connected", verdict="unknown", count=3),
        replace(of("relay"), port=7777, cause="connected", count=2),
        replace(of("relay"), port=7778, cause="explicit", count=2),
        replace(of("relay"), port=7779, cause="unknown", count=1),
        replace(ROW, sender=Sender(""), cause="forwarded", interface="vnet3", count=1),
        replace(ROW, sender=Sender("game", 8, pod="game-0", namespace="play"), actual=ROW.expected, count=1),
        replace(ROW, sender=Sender("openvpn", 9, container="vpn"), expected="172.16.13.14", count=1),
    )
    refused = {"several-addresses": 3, "group": 0, "not-local": 1}
    healing = Healing("port 69", True, False, not_healed=("network namespace of game-0: no right to enter",),
                      refused=refused)  # fmt: skip
    healed = rows_text((replace(of("snmpd"), port=161), HEALED_ROW), False, healing)
    compare("explain.txt", f"{rows_text(rows, False)}\n{'-' * 80}\n{healed}\n")


@pytest.mark.usefixtures("in_utc")
def test_healed_row_is_explained_as_right_and_to_be_fixed() -> None:
    what, how, then = explanation(HEALED_ROW)
    assert "172.16.13.13, port 69/udp, and replied from that address" in what
    assert "41 times since 2027-01-15 08:00:00" in what
    assert "udpwatch set it to 172.16.13.13" in how
    assert "still needs the fix" in then
    assert advice(HEALED_ROW).config == 'TFTP_ADDRESS="172.16.13.13:69"'
    assert "udpwatch heal off 69" in heal_sentence(HEALED_ROW, None)


@pytest.mark.parametrize(
    ("healing", "told"),
    [
        (None, "start its agent with --heal 1194 (Helm chart: heal: [1194])."),
        (Healing("port 53", True, False), "udpwatch heal on 1194 (as root;"),
        (Healing("port 53", True, False, ports_on=(1194,)), "switched on, except for what it refuses"),
        (Healing("port 53", True, True), "start it without."),
        (Healing("port 53", False, False, reason="no cgroup/sendmsg4"), "(no cgroup/sendmsg4)"),
    ],
)
def test_explain_says_how_to_heal_what_routing_chose(healing: Healing | None, told: str) -> None:
    assert told in heal_sentence(ROW, healing)
    assert told in " ".join(rows_text([ROW], False, healing).split())
    assert told in row_object(ROW, healing)["heal"]


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (Cause.CONNECTED, "cannot heal this: connect() chose"),
        (Cause.EXPLICIT, "cannot heal this: the server names its source"),
        (Cause.FORWARDED, "cannot heal this here: another machine"),
        (Cause.UNKNOWN, "is unknown"),
    ],
)
def test_explain_says_what_healing_cannot_do(cause: Cause, told: str) -> None:
    assert told in heal_sentence(replace(ROW, cause=cause), Healing("all ports", True, False))


def test_refusals_are_told_with_their_reasons() -> None:
    told = rows_object([], Healing("all ports", True, False, refused={"group": 0, "several-addresses": 3}))
    assert told["not_healed"] == [
        "3 replies (several-addresses): the client asked several addresses within the window, or may have."
    ]
    assert "3 replies (several-addresses)" in rows_text(
        [], False, Healing("x", True, False, refused={"several-addresses": 3})
    )
    assert rows_text([], False, Healing("x", True, False)) == ""


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict is not Verdict.HEALED])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("same_address", [False, True])
def test_explanation_names_the_addresses(cause: Cause, verdict: Verdict, family: int, same_address: bool) -> None:
    row = replace(ROW if family == 4 else ROW_6, cause=str(cause), verdict=str(verdict))
    if same_address:
        row = replace(row, actual=row.expected)
    sentences = explanation(row)
    assert len(sentences) == 3
    for sentence in sentences:
        assert re.fullmatch(r"\S.*\.\)?", sentence)
        assert not re.search(r"\. [A-Z]", sentence)
    assert row.expected in sentences[0]
    assert row.actual in sentences[0]
    assert f"port {row.port}/udp" in sentences[0]
    assert advice(row).do


def test_unknown_sender() -> None:
    for unknown in (Sender(""), Sender("unknown")):
        assert explanation(replace(ROW, sender=unknown))[0].startswith("An unknown process was asked at 172.16.13.13,")
    assert explanation(replace(ROW, cause="forwarded"))[0].startswith("Another machine was asked at")


def test_known_server_gets_its_remedy() -> None:
    todo = advice(of("openvpn"))
    assert (todo.server, todo.config) == ("OpenVPN", "multihome")
    assert todo.source == "https://github.com/OpenVPN/openvpn/issues/476"
    assert advice(of("unbound")).config == "interface-automatic: yes"
    assert advice(of("iperf3")).config == "iperf3 -s -B 172.16.13.13"


def test_setting_has_the_addresses_of_the_finding() -> None:
    snmpd = replace(of("snmpd"), port=161)
    assert advice(snmpd).config == "agentAddress udp:172.16.13.13:161"
    assert advice(replace(snmpd, expected="fd00::2", family=6)).config == "agentAddress udp6:[fd00::2]:161"
    haproxy = replace(of("haproxy"), expected="fd00::2", family=6, port=443)
    assert advice(haproxy).config == "bind quic6@[fd00::2]:443 ssl crt CERTIFICATE alpn h3"


def test_no_remedy_leaves_a_placeholder() -> None:
    for remedy in remedies():
        for row in (ROW, ROW_6, None):
            assert not re.search(r"\{\w*\}", remedy_advice(remedy, row).config), remedy.name


def test_server_is_found_by_the_name_that_the_kernel_cuts() -> None:
    assert remedy_of(Sender("dnscrypt-proxy")) is remedy_named("dnscrypt-proxy")
    assert remedy_of(Sender("srt-live-transm")) is remedy_named("srt (LIBSRT)")
    assert remedy_of(Sender("node-MainThread")) is remedy_named("node")
    python = remedy_named("Python")
    assert python
    assert remedy_of(Sender("python3.11")) is python
    assert remedy_of(Sender("my-service", 1, "/usr/bin/python3.11")) is python
    assert remedy_of(Sender("worker", 1, "/usr/bin/node (deleted)")) is remedy_named("node")
    assert remedy_of(Sender("certbot", 1, "/usr/bin/python3.11")) is remedy_named("certbot-dns-standalone")
    for unknown in ("", "open", "openvpn2", "node_exporter", "nodes", "unknown"):
        assert remedy_of(Sender(unknown)) is None
    assert remedy_named("no such server") is None


def test_settings_do_not_fix_explicit_and_forwarded_replies() -> None:
    for cause in (Cause.EXPLICIT, Cause.FORWARDED):
        todo = advice(replace(of("openvpn"), cause=str(cause)))
        assert (todo.server, todo.config) == ("", "")


def test_unknown_server_gets_code_in_every_language() -> None:
    assert advice(of("my-server")).languages == ("C", "Go", "Python", "Rust", "Node.js")
    assert advice(of("python3")).languages == ("Python",)
    text = rows_text([of("one"), of("other")], False)
    for code in codes():
        assert text.count(f"In {code.language}:") == 1
        assert all(line in text for line in code.text.splitlines())


def test_remedies_file_is_valid() -> None:
    names = [name for remedy in remedies() for name in remedy.processes]
    assert len(set(names)) == len(names)
    text = FILE.read_text()
    for remedy in remedies():
        assert remedy.do.endswith(".")
        assert remedy.code in ("", *(code.language for code in codes()))
    for each in (*remedies(), *codes()):
        link = urlsplit(each.source)
        assert link.scheme == "https"
        if link.netloc == "github.com":
            assert re.fullmatch(r"/[\w.-]+/[\w.-]+/(issues|pull)/\d+", link.path), each.source
    assert all(line.isprintable() for line in text.replace("\t", "").splitlines())


def test_rows_are_selected_by_server_or_port() -> None:
    rows = [replace(of("a"), count=1), replace(of("openvpn"), count=5), replace(of("c"), port=53, count=9)]
    assert [row.count for row in matching(rows, None)] == [9, 5, 1]
    assert [row.count for row in matching([*rows, replace(HEALED_ROW, count=99)], None)] == [9, 5, 1, 99]
    assert [row.count for row in matching(rows, "53")] == [9]
    assert [row.count for row in matching(rows, "openvpn")] == [5]
    assert [row.count for row in matching(rows, "open*")] == [5]
    assert matching(rows, "OpenVPN") == []
    assert matching([replace(ROW, sender=Sender("x", pod="vpn-0"))], "vpn-*")
    assert matching([replace(ROW, sender=Sender("x[1]"))], "x[1]")
    assert matching([replace(ROW, sender=Sender(""))], "") == []


def test_advice_is_printed_once_and_rows_are_bounded() -> None:
    rows = [replace(ROW, sender=Sender("openvpn", 100 + at), port=1000 + at) for at in range(MAX_ROWS + 5)]
    text = rows_text(rows, False)
    assert text.count("multihome") == 1
    assert text.count("was asked at") == MAX_ROWS
    assert "5 more" in text
    assert len(rows_object(rows)["findings"]) == MAX_ROWS + 5


def test_short_advice_fits_the_detail_pane() -> None:
    assert short_advice(ROW).splitlines()[1:] == ["multihome", "https://github.com/OpenVPN/openvpn/issues/476"]
    assert short_advice(ROW).startswith("OpenVPN: ")
    for row in (of("my-server"), replace(ROW, cause="forwarded"), replace(ROW, cause="explicit"), of("quilkin")):
        assert 1 <= len(short_advice(row).splitlines()) <= 3


def test_json_object() -> None:
    found = row_object(ROW)
    assert found["why"] == list(explanation(ROW))
    assert found["remedy"]["config"] == "multihome"
    assert found["pod"] is None
    everything = rows_object([of("my-server")])
    assert set(everything["code"]) == {"C", "Go", "Python", "Rust", "Node.js"}


def test_colour_changes_no_text_and_lines_fit_the_width() -> None:
    rows = [ROW, of("my-server"), replace(of("x"), cause="connected")]
    assert ESCAPE not in rows_text(rows, False)
    assert ESCAPE in rows_text(rows, True)
    assert max(map(len, rows_text([ROW], False).splitlines())) <= 80
    known = remedy_named("unbound")
    assert known
    assert "interface-automatic: yes" in remedy_text(known, False)


def test_control_characters_in_names_are_escaped() -> None:
    nasty = "a\x1b[2Jb\u202ec\n[red]"
    sender = Sender(nasty, 1, pod=nasty, namespace=nasty)
    rows = [
        replace(ROW, sender=sender),
        replace(ROW, sender=Sender(nasty, container=nasty)),
        replace(ROW, cause="forwarded", interface=nasty),
    ]
    text = rows_text(rows, False)
    assert all(line.isprintable() for line in text.replace("\t", "").splitlines())
    assert "\n[red]" not in text


@pytest.mark.parametrize("code", codes(), ids=lambda code: code.language)
def test_code_compiles(code: Code, tmp_path: Path) -> None:
    """This is as far as a machine without network can check; tests/integration/test_cures.py runs the programs."""
    suffix, command = {
        "C": (".c", ["gcc", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]),
        "Go": (".go", ["gofmt", "-l"]),  # it needs golang.org/x/net to be built
        "Python": (".py", [sys.executable, "-m", "py_compile"]),
        "Rust": (".rs", ["rustfmt", "--check", "--edition", "2021"]),  # it needs the crate nix to be built
        "Node.js": (".js", ["node", "--check"]),
    }[code.language]
    if not shutil.which(command[0]):
        packages = {"gofmt": "golang-go", "node": "nodejs"}
        pytest.skip(f"needs {command[0]}: apt-get install {packages.get(command[0], command[0])}")
    path = tmp_path / f"answer{suffix}"
    path.write_text(code.text)
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
