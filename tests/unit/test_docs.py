"""The documents name everything that exists, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from repository import DOCS, GOLDEN, ROOT

from udpwatch.agent.config import SETTINGS
from udpwatch.agent.daemon.state import LOSS_STAGES
from udpwatch.agent.model import REFUSALS

PAGES = (*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md")), ROOT / "helm/udpwatch/README.md")
COLUMNS = 120


def test_every_metric_is_documented_and_the_reverse() -> None:
    golden = "".join((ROOT / f"tests/golden/{name}.txt").read_text() for name in ("metrics", "dns-metrics"))
    exported = set(re.findall(r"^(udpwatch_\w+?)(?:_bucket|_count|_sum)?(?:\{| )", golden, re.MULTILINE))
    documented = set(re.findall(r"`(udpwatch_\w+)(?:\{[\w,]+\})?`", (DOCS / "metrics.md").read_text()))
    assert documented == exported


def test_every_loss_stage_is_documented() -> None:
    section = (DOCS / "metrics.md").read_text().partition("## Loss stages\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- `(\w+)`: ", section, re.MULTILINE) == list(LOSS_STAGES)


def test_each_reason_of_a_refusal_is_documented() -> None:
    section = (DOCS / "metrics.md").read_text().partition("### Heal refusal reasons\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- `([\w-]+)`:", section, re.MULTILINE) == list(REFUSALS)


def test_every_event_key_is_documented() -> None:
    table = (DOCS / "events.md").read_text().partition("```sh")[0]
    documented = [key for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for key in re.findall(r"\w+", row)]
    keys = list(json.loads((ROOT / "tests/golden/events.jsonl").read_text().splitlines()[0]))
    assert documented == keys


def test_every_setting_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.*?)\|", (DOCS / "settings.md").read_text(), re.MULTILINE)
    expected = [(s.flag, "" if s.default is None else f"`{s.default}`") for s in SETTINGS]
    assert [(flag, default.strip()) for flag, default in rows] == expected


def test_paths_in_contributing_exist() -> None:
    named = set(re.findall(r"\b(?:agent|docs|helm|tests)/[\w./-]*\w", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named and [path for path in sorted(named) if not (ROOT / path).exists()] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_existing_files_and_headings() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            other = page.parent / target if target else page
            assert other.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(other), f"{page}: {target}#{anchor}"


def long_lines(page: Path) -> Iterator[int]:
    """Return the numbers of lines that are too long, except output in a code block without a language."""
    fence = ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            fence = "" if fence else line
        elif len(line) > COLUMNS and fence != "```":
            yield number


def test_pages_are_at_most_120_columns_wide() -> None:
    wide = {str(page.relative_to(ROOT)): list(long_lines(page)) for page in PAGES}
    assert {name: numbers for name, numbers in wide.items() if numbers} == {}


def test_explain_page_shows_what_explain_prints() -> None:
    command, _, shown = (DOCS / "explain.md").read_text().split("```\n")[1].partition("\n")
    assert command == "$ udpwatch explain openvpn"
    assert shown in (GOLDEN / "explain.txt").read_text()
