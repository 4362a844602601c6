"""The kernel matrix: results are kept until something changes that they depend on, and what counts as a failure."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import matrix
from matrix import Case, Kept, Outcome, Row, read, state

ROW = Row("6.12")
ONE, OTHER = "tests/integration/test_one.py", "tests/integration/test_other.py"
FILES = {
    "pyproject.toml": "",
    "agent/daemon/app.py": "",
    "bpf/sockets.c": "",
    "docs/kernels.md": "",
    "tests/conftest.py": "",
    "tests/kernels/guest.py": "",
    "tests/integration/conftest.py": "",
    "tests/support/agents.py": "",
    ONE: "",
    OTHER: "",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    for name, content in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "tree"


def kept(tree: Path, release: str = "6.12.1") -> Kept:
    return Kept(ROW.name, release, state(tree))


def remembered(tree: Path, release: str = "6.12.1") -> tuple[set[str], bool]:
    """Return the files whose results are kept, and whether the facts about the machine are."""
    outcome = kept(tree, release).read(Outcome(ROW))
    return {test.file for test in outcome.results}, bool(outcome.release)


def run(tree: Path, *failing: str) -> None:
    """Store results as if both files had been run."""
    folder = tree.parent / ROW.name
    folder.mkdir(exist_ok=True)
    (folder / "request.json").write_text(json.dumps({"pytest": ["-v", ONE, OTHER]}))
    results = [Case(f"{file}::test", "failed" if file in failing else "passed", "") for file in (ONE, OTHER)]
    kept(tree).write(Outcome(ROW, release="6.12.1", lockdown="none", mode="packet", results=results))


def test_passed_files_are_kept(tree: Path) -> None:
    assert remembered(tree) == (set(), False)
    run(tree)
    assert remembered(tree) == ({ONE, OTHER}, True)
    assert remembered(tree, release="6.12.2") == (set(), False)


def test_failed_files_are_not_kept(tree: Path) -> None:
    run(tree, ONE)
    assert remembered(tree) == ({OTHER}, True)


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ("docs/kernels.md", ({ONE, OTHER}, True)),
        (ONE, ({OTHER}, True)),
        (OTHER, ({ONE}, True)),
        ("tests/support/agents.py", (set(), False)),
        ("tests/integration/conftest.py", (set(), False)),
        ("tests/kernels/guest.py", (set(), False)),
        ("agent/daemon/app.py", (set(), False)),
        ("bpf/sockets.c", (set(), False)),
    ],
)
def test_change_discards_the_results_that_depend_on_it(tree: Path, changed: str, left: tuple[set[str], bool]) -> None:
    run(tree)
    with (tree / changed).open("a") as file:
        file.write("\n")
    assert remembered(tree) == left


def test_results_of_single_tests_are_not_kept(tree: Path) -> None:
    folder = tree.parent / ROW.name
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"pytest": ["-v", f"{ONE}::test"]}))
    results = [Case(f"{ONE}::test", "passed", "")]
    kept(tree).write(Outcome(ROW, release="6.12.1", lockdown="none", mode="packet", results=results))
    assert remembered(tree) == (set(), True)


# ---- faults ----

HOOKS = [
    *("ingress", "egress", "sendmsg4", "sendmsg6", "ingress_slow", "egress_slow", "count_waiting"),
    *("post_bind4", "post_bind6", "sockets_here", "adopt_sockets", "noted_sockets"),
]
HEALING = ["egress_healed", "heal4", "heal6"]
PROBES = ["udp_sendmsg", "udpv6_sendmsg", "__nf_conntrack_confirm", "nf_ct_delete", "settle", "add_request"]


def faults(folder: Path, row: Row, programs: list[str], level: str = "none", heals: bool | None = None) -> list[str]:
    """Return the faults of a guest that left this report."""
    if heals is None:
        heals = level != "confidentiality"
    checks = [{"name": name, "found": "attached; the verifier walked 100 instructions"} for name in programs]
    checks.append({"name": "forwarded", "found": "not looked for"})
    mode = "netlink" if level == "confidentiality" else "packet"
    heal = {
        "instructions": dict.fromkeys(HEALING if heals else (), 100),
        "refused": {} if heals else {"heal4": "cannot read kernel memory; the kernel is locked down"},
    }
    doctor = {"mode": mode, "checks": checks}
    result = {"release": "6.12.1", "lockdown": level, "doctor": doctor, "heal": heal, "bench": "", "pytest": None}
    (folder / "result.json").write_text(json.dumps(result))
    outcome = Outcome(row)
    read(outcome, folder)
    return outcome.faults


@pytest.mark.parametrize("kernel", list(matrix.SUITES))
def test_report_with_every_program_has_no_fault(tmp_path: Path, kernel: str) -> None:
    programs = [name for name in HOOKS + PROBES if (kernel, name) != ("5.10", "adopt_sockets")]
    assert faults(tmp_path, Row(kernel), programs) == []
    assert faults(tmp_path, Row(kernel, "integrity"), programs, "integrity") == []


@pytest.mark.parametrize("missing", HOOKS + PROBES)
def test_missing_program_is_a_fault(tmp_path: Path, missing: str) -> None:
    """Tests of a missing program are skipped, so none fails."""
    (fault,) = faults(tmp_path, ROW, [name for name in HOOKS + PROBES if name != missing])
    assert f"not attached, by doctor's report: {missing};" in fault


def test_missing_function_probes_are_one_fault_unless_locked_down(tmp_path: Path) -> None:
    assert len(faults(tmp_path, ROW, HOOKS)) == 1
    assert len(faults(tmp_path, Row("6.12", "integrity"), HOOKS, "integrity")) == 1
    assert faults(tmp_path, Row("6.12", "confidentiality"), HOOKS, "confidentiality") == []
    assert faults(tmp_path, Row(matrix.NATIVE, None), HOOKS) == []


def test_missing_hook_is_a_fault_even_when_locked_down(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, Row("6.12", "confidentiality"), HOOKS[1:], "confidentiality")
    assert "ingress" in fault
    (fault,) = faults(tmp_path, Row(matrix.NATIVE, None), HOOKS[1:])
    assert "ingress" in fault


def test_missing_healing_is_a_fault_unless_the_kernel_is_locked_down(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, ROW, HOOKS + PROBES, heals=False)
    assert fault == "replies are not healed: cannot read kernel memory; the kernel is locked down"
    (fault,) = faults(tmp_path, Row("6.12", "confidentiality"), HOOKS, "confidentiality", heals=True)
    assert "healing needs kernel memory" in fault


def test_exceeding_the_instruction_budget_is_a_fault() -> None:
    """A change that approaches the verifier's limit is noticed."""
    with matrix.BUDGET.open("rb") as file:
        egress = tomllib.load(file)["6.12"]["egress"]

    def over(kernel: str, **programs: int) -> list[str]:
        return list(matrix.over_budget(Outcome(Row(kernel), release="6.12.1", lockdown="none", programs=programs)))

    assert over("6.12", egress=egress) == []
    (fault,) = over("6.12", egress=egress + 1)
    assert "egress" in fault
    assert f"{egress:,}" in fault
    (fault,) = over("6.12", newcomer=1)
    assert "newcomer" in fault
    assert over(matrix.NATIVE, egress=10 * egress, newcomer=1) == []


# ---- the table of docs/kernels.md ----


def test_table_names_attached_programs_and_counts_failures() -> None:
    results = [
        Case(f"{ONE}::test_{number}", outcome, "") for number, outcome in enumerate(("passed", "failed", "passed"))
    ]
    programs = dict.fromkeys(HOOKS + PROBES, 100)
    here = Outcome(ROW, release="6.12.1", lockdown="none", mode="packet", programs=programs, results=results)
    own = Outcome(Row(matrix.NATIVE, None), release="6.18.44", lockdown="integrity", mode="packet")
    assert matrix.as_markdown([here, own]).splitlines()[2:] == [
        "| 6.12 (trixie) | none | `packet` | all | yes | 2 passed, 1 failed |",
        "| 6.18 (the machine's own) | integrity | `packet` |  | yes | none |",
    ]
