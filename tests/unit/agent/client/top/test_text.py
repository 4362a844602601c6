"""What `udpwatch top` prints without a screen: --once, --json, plain lines."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import Any

from repository import DOCS
from top_snapshots import healed_row, row, view

from udpwatch.agent.client.top import text
from udpwatch.agent.client.top.detail import detail, title
from udpwatch.agent.client.top.layout import plain
from udpwatch.agent.client.top.rows import Order, View, rows
from udpwatch.agent.client.top.sources import Wanted
from udpwatch.agent.model import Healing


class Script:
    """A source whose views are given."""

    name = "script"

    def __init__(self, *said: View | OSError) -> None:
        self._said = iter(said)

    def read(self) -> View:
        said = next(self._said)
        if isinstance(said, OSError):
            raise said
        return said

    def select(self, wanted: Wanted) -> None:
        pass

    def events(self, limit: int) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        pass


def test_once_reads_two_looks() -> None:
    seen = text.once(Script(view(0, row(count=1)), view(1, row(count=3)), view(2, row(count=9))), 0.01)
    assert seen.wrong == 2.0


def test_once_waits_for_a_new_snapshot() -> None:
    seen = text.once(Script(view(0, row()), view(0, row()), view(0.5, row(count=2))), 0.01)
    assert seen.wrong == 2.0


def test_table_fits_the_width() -> None:
    seen = text.once(Script(view(0, row(count=1)), view(1, row(count=3))), 0.01)
    for width in (80, None):
        lines = text.table(seen, width, "script").splitlines()
        assert lines[-1].split()[:5] == ["openvpn", "-", "1194", "172.16.13.13", "172.17.0.1"]
        assert all(len(line) <= (width or 200) for line in lines)
    assert "No wrong reply so far: 100 replies checked." in text.table(view(0), 80, "script")


def test_json_object_has_only_documented_keys() -> None:
    seen = text.once(Script(view(0, row(count=1)), view(1, row("\x1b[31m[red]", count=3), row(count=3), other=2)), 0.01)
    told = json.loads(json.dumps(text.as_json(seen)))
    assert told["findings"][0] | {"last": None} == {
        "node": "node-1", "process": "\x1b[31m[red]", "pid": 4242, "command": None, "namespace": None, "pod": None,
        "container": None, "interface": None, "port": 1194, "expected": "172.16.13.13", "actual": "172.17.0.1",
        "family": 4, "verdict": "new", "cause": "kernel-chosen", "rate": 3.0, "total": 3, "last": None,
    }  # fmt: skip
    assert told["nodes"][0]["wrong"] == 8
    assert told["wrong_per_second"] == 7.0
    documented = (DOCS / "top.md").read_text()
    for names in (told, told["nodes"][0], told["findings"][0]):
        assert not [name for name in names if f"`{name}`" not in documented]


def test_healed_rows_are_apart_from_findings_in_json() -> None:
    healing = Healing("port 69", True, False, refused={"group": 2})
    said = (view(second, row(), healed_row(count=count), healing=healing) for second, count in ((0, 1), (1, 3)))
    seen = text.once(Script(*said), 0.01)
    told = json.loads(json.dumps(text.as_json(seen)))
    assert [each["process"] for each in told["findings"]] == ["openvpn"]
    assert [(each["process"], each["verdict"], each["rate"]) for each in told["healed"]] == [("tftpd", "healed", 2.0)]
    assert (told["wrong_per_second"], told["healed_servers"]) == (0.0, 1)
    node = told["nodes"][0]
    assert (node["wrong"], node["healed"]) == (1, 3)
    assert node["healing"] == {"active": True, "dry_run": False, "refused": {"group": 2}}
    assert "healed 3 replies of 1 server\n" in text.table(seen, 80, "script")


def test_plain_lines_show_rows_that_grew() -> None:
    before: dict[Any, int] = {}
    assert len(text.changes(view(0, row(), row("\x1b]0;x\x07", 53)), before)) == 2
    lines = text.changes(view(1, row(), row("\x1b]0;x\x07", 53, count=2)), before)
    assert len(lines) == 1
    assert "port 53 asked 172.16.13.13 replied 172.17.0.1 new kernel-chosen" in lines[0]
    assert lines[0].isprintable()


def test_control_characters_of_a_source_are_escaped() -> None:
    """Prometheus forwards any text in labels, including verdict and cause."""
    evil = "\x1b]52;c;eA==\x07\r"
    found = row(evil, namespace=evil, pod=evil, container=evil, expected=evil, actual=evil, verdict=evil, cause=evil)
    seen = replace(view(0, found, node=evil, mode=evil, kernel=evil), cluster=True)
    (line,) = rows(seen, Order.TOTAL)
    shown = [text.table(seen, width, "script") for width in (None, 100, 40)]
    shown += [*text.changes(seen, {}), title(line)]
    shown += [plain(each) for each in detail(line, (), "", 80, cluster=True)]
    for each in "\n".join(shown).split("\n"):
        assert each.isprintable()


def test_looks_continue_after_an_error_and_log_it_once() -> None:
    said: list[str] = []
    gone = ConnectionRefusedError(111, "Connection refused")
    script = Script(view(0, row()), gone, gone, view(1, row(count=2)), gone, view(2, row(count=2)))
    seen = list(islice(text.views(script, 0.01, said.append), 3))
    assert [each.snapshots[0].rows[0].count for each in seen] == [1, 2, 2]
    assert said == ["not connected: Connection refused; retrying"] * 2
