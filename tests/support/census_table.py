"""The results of the census: stored, counted, and written as a table of docs/census.md."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from census import GENERAL, Outcome, Setup
from repository import DOCS

PAGE = DOCS / "census.md"
_BEGIN, _END = "<!-- make census writes from here -->\n", "<!-- to here -->\n"


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    key: str  # of the set-up that was run
    name: str
    package: str
    version: str
    remedy: str  # "": none
    families: str
    expected: str  # families with wrong replies, as the set-up says
    predicted: str  # by audit, before the first packet
    wrong: str  # families with wrong replies
    silent: tuple[str, ...]  # addresses without a reply
    findings: int
    elsewhere: bool  # it replies from another port
    fixed_wrong: str = ""
    fixed_silent: tuple[str, ...] = ()
    fixed_findings: int = 0
    note: str = ""
    log: str = ""  # the end of it, if something failed

    @property
    def failures(self) -> list[str]:
        """What is not as the set-up says."""
        found = []
        if self.silent:
            found.append(f"no reply from {', '.join(self.silent)}")
        elif self.wrong != self.expected:
            found.append(f"wrong replies over {families(self.wrong)}, expected {families(self.expected)}")
        if not self.silent and not self.elsewhere and bool(self.findings) != bool(self.wrong):
            found.append(f"{self.findings} findings of the sensor")
        if self.remedy and self.fixed_silent:
            found.append(f"with the fix no reply from {', '.join(self.fixed_silent)}")
        if self.fixed_wrong or self.fixed_findings:
            found.append(f"with the fix wrong replies over {families(self.fixed_wrong)}")
        return found


def key_of(setup: Setup) -> str:
    """Return a key that changes with the set-up and its remedy."""
    fix = "" if setup.remedy in ("", GENERAL) else setup.known.config
    return hashlib.sha256(repr((asdict(setup), fix)).encode()).hexdigest()[:16]


def result_of(setup: Setup, version: str, first: Outcome, fixed: Outcome | None) -> Result:
    """Return the row of a set-up. ``fixed``: with the remedy; None: it has none."""
    row = Result(
        key_of(setup),
        setup.name,
        setup.packages[0],
        version,
        setup.remedy,
        setup.families,
        setup.wrong,
        first.predicted(setup.families),
        first.wrong(),
        tuple(first.silent()),
        first.findings,
        setup.elsewhere,
        fixed.wrong() if fixed else "",
        tuple(fixed.silent()) if fixed else (),
        fixed.findings if fixed else 0,
        setup.note,
    )
    if not row.failures:
        return row
    return Result(
        **{**asdict(row), "log": first.log[-600:] + (f"\n-- with the fix\n{fixed.log[-600:]}" if fixed else "")}
    )


def read(path: Path) -> dict[str, Result]:
    """Return stored results by name."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    return {
        each["name"]: Result(**{**each, "silent": tuple(each["silent"]), "fixed_silent": tuple(each["fixed_silent"])})
        for each in stored
    }


def write(path: Path, results: Iterable[Result]) -> None:
    """Store results."""
    path.write_text(json.dumps([asdict(each) for each in results], indent=1))


@dataclass(frozen=True)
class Agreement:
    """audit's verdicts beside what the servers did, one for each set-up and family."""

    right: int  # wrong replies that audit predicted
    false: int  # predicted, but the replies were right
    missed: int
    neither: int

    def __str__(self) -> str:
        return f"precision {_ratio(self.right, self.false)}, recall {_ratio(self.right, self.missed)}"


def agreement(results: Iterable[Result]) -> Agreement:
    """Compare audit with the servers that replied at each address."""
    counts = {(predicted, wrong): 0 for predicted in (False, True) for wrong in (False, True)}
    for each in results:
        for family in each.families if not each.silent else "":
            counts[family in each.predicted, family in each.wrong] += 1
    return Agreement(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def table(results: Sequence[Result]) -> str:
    """Return the table with what it adds up to, in Markdown."""
    replied = [each for each in results if not each.silent]
    wrong = [each for each in replied if each.wrong]
    fixed = [each for each in wrong if each.remedy and not (each.fixed_wrong or each.fixed_silent)]
    found = agreement(replied)
    summary = (
        f"{len(replied)} set-ups replied at each address; {len(wrong)} of them from the wrong one, and {len(fixed)} of "
        f"these replied from the right one with the fix. audit's verdict before the first packet, for each set-up and "
        f"family: {found} ({found.right} predicted, {found.false} predicted but right, {found.missed} missed, "
        f"{found.neither} right and predicted so)."
    )
    lines = [
        *textwrap.wrap(summary, 120, break_long_words=False, break_on_hyphens=False),
        "",
        "| set-up | package and version | asked over | audit | replies | findings | with the fix |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in sorted(replied, key=lambda each: each.name.lower()):
        cells = (
            each.name + (f" ({each.note})" if each.note else ""),
            f"{each.package} {each.version}",
            short(each.families),
            f"wrong: {short(each.predicted)}" if each.predicted else "right",
            f"wrong: {short(each.wrong)}" if each.wrong else "right",
            str(each.findings),
            _fixed(each),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_page(text: str, path: Path = PAGE) -> None:
    """Put the table into the page."""
    page = path.read_text()
    head, rest = page.split(_BEGIN)
    path.write_text(head + _BEGIN + "\n" + text + "\n" + _END + rest.split(_END)[1])


def families(digits: str) -> str:
    """Name families: "46" -> "IPv4 and IPv6"."""
    return " and ".join(f"IPv{each}" for each in digits) or "none"


def short(digits: str) -> str:
    """Name families in a cell: "46" -> "4, 6"."""
    return ", ".join(digits)


def _fixed(result: Result) -> str:
    if not result.remedy:
        return "no setting is known" if result.wrong else ""
    if result.fixed_silent:
        return "no reply"
    return f"wrong: {short(result.fixed_wrong)}" if result.fixed_wrong else "right"


def _ratio(right: int, other: int) -> str:
    return f"{right / (right + other):.2f}" if right + other else "unknown"
