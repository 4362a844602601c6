"""The results of the census: stored, counted, and written as a table of docs/census.md."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from census import GENERAL, Outcome, Setup, remedy_called
from repository import DOCS

from udpwatch.agent.model import Cause

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
    disagreements: tuple[str, ...] = ()  # of audit, the sensor, the client and explain
    fixed_predicted: str = ""
    fixed_wrong: str = ""
    fixed_silent: tuple[str, ...] = ()
    fixed_findings: int = 0
    healed: int = 0  # replies that the sensor counted as healed, with healing on and without the fix
    healed_wrong: str = ""  # families with wrong replies then
    healed_silent: tuple[str, ...] = ()
    healed_findings: int = 0  # of wrong replies then
    unhealed: tuple[str, ...] = ()  # why those were not healed, as the sensor reports it
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
        if not self.silent:
            found += self.disagreements
        if self.remedy and self.fixed_silent:
            found.append(f"with the fix no reply from {', '.join(self.fixed_silent)}")
        if self.fixed_wrong or self.fixed_findings:
            found.append(
                f"with the fix wrong replies over {families(self.fixed_wrong)}, {self.fixed_findings} findings"
            )
        if self.fixed_predicted:
            found.append(f"with the fix audit expects wrong replies over {families(self.fixed_predicted)}")
        return found + self._failures_of_healing()

    def _failures_of_healing(self) -> list[str]:
        found = []
        if self.healed_silent and not self.silent:
            found.append(f"with healing no reply from {', '.join(self.healed_silent)}")
        if worse := "".join(each for each in self.healed_wrong if each not in self.wrong):
            found.append(f"healing made replies wrong over {families(worse)}")
        if (self.healed_wrong or self.healed_findings) and not self.unhealed:
            found.append(f"with healing wrong replies over {families(self.healed_wrong)}, for no reason")
        if self.wrong != self.healed_wrong and not self.healed:
            found.append("healing made replies right, and none was counted")
        return found


def key_of(setup: Setup) -> str:
    """Return a key that changes with the set-up and its remedy."""
    fix = "" if setup.remedy in ("", GENERAL) else setup.known.config
    return hashlib.sha256(repr((asdict(setup), fix)).encode()).hexdigest()[:16]


def result_of(setup: Setup, version: str, first: Outcome, fixed: Outcome | None, healed: Outcome) -> Result:
    """Return the row of a set-up. ``fixed``: with the remedy; None: it has none. ``healed``: with healing instead."""
    row = Result(
        key_of(setup),
        setup.name,
        setup.packages[0].partition("=")[0],
        version,
        setup.remedy,
        setup.families,
        setup.wrong,
        first.predicted(setup),
        first.wrong(),
        tuple(first.silent()),
        len(first.findings),
        tuple(disagreements(setup, first)),
        fixed.predicted(setup) if fixed else "",
        fixed.wrong() if fixed else "",
        tuple(fixed.silent()) if fixed else (),
        len(fixed.findings) if fixed else 0,
        healed.healed,
        healed.wrong(),
        tuple(healed.silent()),
        len(healed.findings),
        tuple(reasons(setup, healed)),
        setup.note,
    )
    if not row.failures:
        return row
    logs = {"": first, "with the fix": fixed, "with healing": healed}
    return replace(row, log="\n".join(f"-- {name}\n{each.log[-600:]}" for name, each in logs.items() if each))


def reasons(setup: Setup, healed: Outcome) -> list[str]:
    """Return why wrong replies were not healed: the findings' causes, refusals, and no finding at all."""
    if not healed.mismatches() and not healed.findings:
        return []
    found = [cause for cause in sorted(healed.causes) if cause is not Cause.KERNEL_CHOSEN]
    if setup.port not in healed.ports and not healed.findings:
        found.append("another port")
    return [*found, *sorted(healed.refused)]


def disagreements(setup: Setup, outcome: Outcome) -> list[str]:
    """Return where audit, the sensor, the client and explain do not agree on a set-up without its fix."""
    found = []
    if not outcome.audit:
        found.append("audit did not list it")
    if outcome.predicted(setup) != setup.predicted:
        expected = families(setup.predicted)
        found.append(f"audit expects wrong replies over {families(outcome.predicted(setup))}, not {expected}")
    if setup.elsewhere == (setup.port in outcome.ports):
        found.append(f"replies from port {', '.join(map(str, sorted(outcome.ports)))}")
    if not setup.elsewhere and set(outcome.findings) != outcome.mismatches():
        found.append(f"the sensor found {dict(outcome.findings)}, the client {outcome.mismatches()}")
    known = {setup.remedy if setup.remedy != GENERAL else ""}
    if not setup.remedy:  # no setting fixes it, and explain says so or knows nothing
        known = {name for name in outcome.remedies() if not name or not remedy_called(name).config}
    if setup.wrong and outcome.remedies() != known:
        found.append(f"explain finds {outcome.remedies()} for the processes {outcome.processes}, not {known}")
    return found


def read(path: Path) -> dict[str, Result]:
    """Return stored results by name, without those of an older form."""
    if not path.exists():
        return {}
    form = {each.name for each in fields(Result)}
    stored = [each for each in json.loads(path.read_text()) if each.keys() == form]
    return {
        each["name"]: Result(**{name: tuple(item) if isinstance(item, list) else item for name, item in each.items()})
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


@dataclass(frozen=True)
class Share:
    """What healing made of the set-ups."""

    right: int  # with wrong replies before, and none with healing
    unhealed: Mapping[str, int]  # the others by reason
    before: int  # set-ups that were right before
    worse: int  # of them with healing

    def __str__(self) -> str:
        wrong = self.right + sum(self.unhealed.values())
        reasons = ", ".join(f"{why}: {number}" for why, number in sorted(self.unhealed.items()))
        reasons = f" ({reasons})" if reasons else ""
        return (
            f"With healing, {self.right} of the {wrong} unchanged set-ups that replied from the wrong address replied "
            f"from the right one ({self.right / max(wrong, 1):.0%}). {wrong - self.right} were not healed{reasons}. Of "
            f"the {self.before} set-ups that were right before, healing made {self.worse} wrong."
        )


def share_healed(results: Iterable[Result]) -> Share:
    """Count the set-ups by what healing made of them."""
    right, before, worse, unhealed = 0, 0, 0, Counter[str]()
    for each in results:
        is_right = not (each.healed_wrong or each.healed_findings or each.healed_silent)
        right += bool(each.wrong) and is_right
        before += not each.wrong
        worse += not each.wrong and not is_right
        if each.wrong and not is_right:
            unhealed[", ".join(each.unhealed) or "no reason"] += 1
    return Share(right, unhealed, before, worse)


def table(results: Sequence[Result], missing: Mapping[str, str] = {}) -> str:
    """Return the table with what it adds up to, in Markdown. ``missing``: why set-ups were not run, by name."""
    replied = [each for each in results if not each.silent]
    wrong = [each for each in replied if each.wrong]
    fixed = [each for each in wrong if each.remedy and not (each.fixed_wrong or each.fixed_silent)]
    found = agreement(replied)
    silent = {each.name: f"no reply from {', '.join(each.silent)}" for each in results if each.silent}
    absent = "".join(f" Not run: {name}: {reason}." for name, reason in {**missing, **silent}.items())
    summary = (
        f"{len(replied)} set-ups replied at each address; {len(wrong)} of them from the wrong one, and {len(fixed)} of "
        f"these replied from the right one with the fix. audit's verdict before the first packet, for each set-up and "
        f"family: {found} ({found.right} predicted, {found.false} predicted but right, {found.missed} missed, "
        f"{found.neither} right and predicted so).{absent}"
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
    return "\n".join([*lines, "", *_healing(replied)]) + "\n"


def _healing(replied: Sequence[Result]) -> list[str]:
    """Return the table of what healing made of the set-ups with wrong replies."""
    lines = [
        *textwrap.wrap(str(share_healed(replied)), 120, break_long_words=False, break_on_hyphens=False),
        "",
        "| set-up | replies | replies with healing | reason |",
        "|---|---|---|---|",
    ]
    for each in sorted(replied, key=lambda each: each.name.lower()):
        if each.wrong or each.healed_wrong or each.healed_findings:
            cells = (
                each.name + (f" ({each.note})" if each.note else ""),
                f"wrong: {short(each.wrong)}" if each.wrong else "right",
                f"wrong: {short(each.healed_wrong)}" if each.healed_wrong or each.healed_findings else "right",
                ", ".join(each.unhealed),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


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
