"""`make test-kernels`: the integration suite on Debian's kernels in QEMU, and natively, as one table.

Each kernel boots with virtme-ng, without KVM, on this machine's own root file system, which it cannot change. A guest
sees a copy of the checkout, so that work may go on in it, and leaves its results in build/kernels; with --resume, what
passed there before and can have changed by nothing since is not run again. A guest is the
first process of a process namespace, which ends with this program: nothing is left running, however this ends.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from guest import HOT, SHARE_TAG
from packages import SUITES, Kernel, Unavailable, obtain

from udpwatch.agent.kernel.programs import FUNCTIONS, HOOKS, PROGRAMS
from udpwatch.agent.testing.lab import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build/kernels"
BUDGET = Path(__file__).with_name("budget.toml")
PAGE = ROOT / "docs/kernels.md"
MARKERS = ("<!-- kernels: begin -->\n", "<!-- kernels: end -->\n")

NATIVE = "native"
EVERYTHING = ("tests/integration",)
MODULE_TESTS = "tests/integration/test_modules.py"  # they come first: before anything uses conntrack
LOCKDOWN_TESTS = (MODULE_TESTS, "tests/integration/test_lockdown.py")

GUESTS_AT_ONCE = len(os.sched_getaffinity(0))
GUEST_MEMORY = "2G"
BOOT_SECONDS = 300  # takes 5 to 30
RUN_SECONDS = 5400
FAREWELL_SECONDS = 30
VERIFIER_LIMIT = 1_000_000
BUDGET_FACTOR = 1.3
TAIL_LINES = 40  # of a console
MESSAGE_LINES = 12  # of a failed test

HEALING = {program.name for program in PROGRAMS if program.is_for_healing}
ATTACHED = {program.name for program, _ in (*HOOKS, *FUNCTIONS)}
#: the programs of the hooks, and those that come with them and are attached to nothing
LEARNING = {program.name for program in PROGRAMS if program.is_for_learning}
WITH_HOOKS = {program.name for program in PROGRAMS if program.source == "sockets.c"} - HEALING - LEARNING

ONE_CPU = "needs two CPUs, a guest has one"
NO_FLOOD = "a flood takes more than an emulated CPU makes"
ANYWHERE = "what it shows does not depend on the kernel, and takes long without KVM"
#: what cannot run in a guest, and why
UNFIT = {
    "tests/integration/test_bare.py": "it tests `make test-bare`, which does not depend on the kernel",
    "tests/integration/test_makefile.py": "it tests make, apt, pip and npm, which do not depend on the kernel",
    "tests/integration/test_install.py": "pip needs the network, and what it installs does not depend on the kernel",
    **{
        f"tests/integration/test_{name}.py": ANYWHERE
        for name in (
            *("cures", "dns", "dns_reload", "dns_tcp", "dns_upstream", "events_command", "explain_port"),
            *("prometheus", "top"),
        )
    },
    "tests/integration/test_containers.py": "Docker and containerd take minutes to start under emulation",
    "tests/integration/test_image.py": "Docker and podman take minutes to start under emulation",
    "tests/integration/test_soak.py": "its traffic, agents and `top` are too much for an emulated CPU",
    "tests/integration/test_unit_file.py": "what it runs is taken from the image",
    "tests/integration/test_lookalikes.py::test_newest_of_requests_seen_by_two_cpus_is_expected": ONE_CPU,
    "tests/integration/test_lookalikes.py::test_first_requests_on_two_cpus_at_once_are_both_kept": ONE_CPU,
    "tests/integration/test_explain_losses.py::test_insertions_into_conntrack_fail": ONE_CPU,
    "tests/integration/test_explain_losses.py::test_two_questions_at_once_from_one_socket_are_not_lost": ONE_CPU,
    **{
        f"tests/integration/test_overload.py::{name}": ANYWHERE
        for name in (
            "test_findings_beyond_the_table_are_counted_under_other",
            "test_agent_without_cpu_is_late_and_loses_no_count",
            "test_memory_limit_that_is_nearly_reached_is_reported",
            "test_memory_limit_that_is_too_low_to_start_is_named",
            "test_short_lived_containers_take_no_more_rows_than_allowed",
            "test_namespaces_beyond_the_limit_are_counted",
            "test_sockets_beyond_the_limit_are_counted",
        )
    },
    **{
        f"tests/integration/test_under_load.py::{name}": NO_FLOOD
        for name in (
            "test_wrong_replies_are_found_beside_a_right_server",
            "test_wrong_replies_are_found_beside_one_way_traffic",
            "test_old_request_survives_a_flood",
            "test_flood_evicts_its_own_requests",
        )
    },
}

#: One CPU per guest: the threads of two wait for each other, and burn ten times the time where the machine has other
#: work. Its clock is the real one: counting instructions (-icount) would make it equally fast on every machine, at less
#: than half the speed.
GUEST_CPUS = 1
#: QEMU emulates the vector instructions of newer ones dearly, and libc would use them.
GUEST_CPU = "Nehalem"
#: The root file system a second time: virtme-ng's mount of it may not be cached, this one is (guest.py).
SHARE = (
    f"-fsdev local,id={SHARE_TAG},path=/,security_model=none,readonly=on,multidevs=remap"
    f" -device virtio-9p-pci,fsdev={SHARE_TAG},mount_tag={SHARE_TAG}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table; tests None: those of the command line."""

    kernel: str  # of packages.SUITES, or NATIVE
    lockdown: str | None = "none"  # None: as the machine has it
    tests: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return self.kernel if self.lockdown in (None, "none") else f"{self.kernel}-{self.lockdown}"


ROWS = (
    *(Row(kernel) for kernel in SUITES),
    *(Row(kernel, level, LOCKDOWN_TESTS) for kernel in SUITES for level in ("integrity", "confidentiality")),
    Row(NATIVE, None),
)


@dataclass(frozen=True, slots=True)
class Case:
    """The result of a test: "passed", "failed" with the end of the message, "skipped" with the reason."""

    name: str
    outcome: str
    message: str

    @property
    def file(self) -> str:
        return self.name.partition("::")[0]


@dataclass(slots=True)
class Outcome:
    """The result of a row."""

    row: Row
    release: str = ""
    lockdown: str = ""
    mode: str = ""
    programs: dict[str, int] = field(default_factory=dict)  # name -> instructions that the verifier walked
    no_healing: str = ""  # why replies cannot be healed
    bench: str = ""  # what it printed
    results: list[Case] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # all but failed tests
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.faults and not self.failed

    @property
    def attached(self) -> str:
        """Return the attached programs, without tail calls and programs that the agent runs on demand."""
        return " ".join(name for name in self.programs if name in ATTACHED)

    @property
    def passed(self) -> int:
        return sum(test.outcome == "passed" for test in self.results)

    @property
    def failed(self) -> list[Case]:
        return [test for test in self.results if test.outcome == "failed"]

    @property
    def skipped(self) -> list[Case]:
        return [test for test in self.results if test.outcome == "skipped"]

    @property
    def tests(self) -> str:
        counts = {"passed": self.passed, "failed": len(self.failed), "skipped": len(self.skipped)}
        nothing = "no result" if self.faults else "none"
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or nothing


# ---- running ----


async def run_rows(
    rows: Sequence[Row], kernels: dict[str, Kernel], tests: Sequence[str], bench: Sequence[str], resume: bool
) -> list[Outcome]:
    """Run guests side by side, then native rows alone, since they share the machine's real time. All use one copy of
    the tree.
    """
    tree = RESULTS / "tree/udpwatch"
    _copy(tree)
    digests = state(tree)
    slots = asyncio.Semaphore(GUESTS_AT_ONCE)

    async def one(row: Row) -> Outcome:
        kernel = kernels.get(row.kernel)
        kept = Kept(row.name, kernel.release if kernel else os.uname().release, digests)
        chosen = () if bench else _files(tree, row.tests if row.tests is not None else tests, kernel)
        known = kept.read(Outcome(row)) if resume and not bench else Outcome(row)
        left = [each for each in chosen if each not in {test.file for test in known.results}]
        if known.release and not left:
            print(f"{row.name}: as before", flush=True)
            return known
        async with slots:
            outcome = await run(row, kernel, tree, left, bench)
        if not bench:
            kept.write(outcome)
        outcome.results += known.results
        return outcome

    async with asyncio.TaskGroup() as group:
        guests = [group.create_task(one(row)) for row in rows if row.kernel != NATIVE]
    return [task.result() for task in guests] + [await one(row) for row in rows if row.kernel == NATIVE]


async def run(row: Row, kernel: Kernel | None, tree: Path, tests: Sequence[str], bench: Sequence[str]) -> Outcome:
    """Boot a kernel, unless the row is native; wait, and read the results."""
    print(f"{row.name}: starts", flush=True)
    begin = time.monotonic()
    folder = RESULTS / row.name
    folder.mkdir()
    unfit = [word for name in UNFIT if kernel for word in ("--deselect", name)]
    request = {"pytest": ["-v", *unfit, *tests] if tests else [], "bench": bench, "cached": [], "kernel": ""}
    script = [sys.executable, str(tree / "tests/kernels/guest.py"), str(folder)]
    environment = _environment(tree)
    if kernel:
        request |= {"cached": [*HOT, sys.prefix, str(tree)], "kernel": row.kernel}
        environment["TMPDIR"] = str(folder)  # what vng would leave in /tmp when it is killed
        inside = f"cd {shlex.quote(str(tree))} && PYTHONPATH={shlex.quote(str(tree.parent))} {shlex.join(script)}"
        script = [*_guest(kernel, row.lockdown or "none", folder), "--", inside]
    (folder / "request.json").write_text(json.dumps(request))
    problem = await _finish(script, folder, environment, tree)
    outcome = Outcome(row, faults=[problem] if problem else [], seconds=time.monotonic() - begin)
    if not problem:
        read(outcome, folder)
    print(f"{row.name}: {outcome.tests}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def _files(tree: Path, tests: Sequence[str], kernel: Kernel | None) -> list[str]:
    """Expand folders to their test files; keep single tests."""
    found = [str(path.relative_to(tree)) for each in tests for path in sorted((tree / each).glob("test_*.py"))]
    chosen = [each for each in found if not kernel or each not in UNFIT] + [each for each in tests if ".py" in each]
    return sorted(chosen, key=lambda each: each != MODULE_TESTS)


def _environment(tree: Path) -> dict[str, str]:
    """Return the environment with the checkout, and with our own programs: pytest, vng and its helpers."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(tree.parent)}


def _copy(tree: Path) -> None:
    """Copy the checkout without the files of tools, and compile it: a guest would take a hundred times as long."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache", ".hypothesis", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    (tree / "build").mkdir()
    (tree / "build/tools").symlink_to(ROOT / "build/tools")
    subprocess.run([sys.executable, "-m", "compileall", "-q", tree], check=True)
    # pytest compiles tests in its own way.
    environment = _environment(tree) | {"PYTHONDONTWRITEBYTECODE": ""}
    collect = ["pytest", "--collect-only", "-qq", *EVERYTHING]
    subprocess.run(collect, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


def _guest(kernel: Kernel, lockdown: str, folder: Path) -> list[str]:
    return [
        *("unshare", "--pid", "--fork", "--kill-child", "--"),
        *("vng", "--run", str(kernel.image), "--disable-kvm", "--force-9p"),
        *("--root", "/", "--rwdir", str(folder), "--memory", GUEST_MEMORY, "--cpus", str(GUEST_CPUS), "--verbose"),
        *("--append", f"mitigations=off init_on_alloc=0{'' if lockdown == 'none' else f' lockdown={lockdown}'}"),
        f"--qemu-opts=-cpu {GUEST_CPU} {SHARE}",
    ]


async def _finish(command: list[str], folder: Path, environment: dict[str, str], cwd: Path) -> str | None:
    """Run to the end, if necessary by killing; returns the problem, if any. No process is left."""
    begin = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    assert process.stdout
    console = asyncio.create_task(_keep(process.stdout, folder / "console.log"))
    ended = asyncio.create_task(process.wait())
    problem = None
    try:
        while not ended.done() and not problem:
            await asyncio.wait([ended], timeout=1)
            seconds = time.monotonic() - begin
            if seconds > BOOT_SECONDS and not (folder / "started").exists():
                problem = f"did not boot within {BOOT_SECONDS} s"
            elif seconds > RUN_SECONDS:
                problem = f"did not end within {RUN_SECONDS} s"
    finally:
        with suppress(ProcessLookupError):
            if process.returncode is None:  # natively pytest shall tidy up; a guest has nothing to tidy
                os.killpg(process.pid, signal.SIGINT)
                await asyncio.wait([ended], timeout=FAREWELL_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
        await console  # until the last process that could write to it is gone
        await ended
    if not problem and not (folder / "result.json").exists():
        problem = f"ended with status {process.returncode} and left no result"
    if problem:
        tail = (folder / "console.log").read_text(errors="replace").splitlines()[-TAIL_LINES:]
        problem += "; the end of its console:\n" + "\n".join(f"    {line}" for line in tail)
    return problem


async def _keep(source: asyncio.StreamReader, path: Path) -> None:
    with path.open("wb") as file:
        while data := await source.read(65536):
            file.write(data)
            file.flush()


# ---- keeping ----


def state(tree: Path) -> dict[str, str]:
    """Test file -> digest of all that its outcome depends on: the program, what tests share, and itself. "": of the
    first two alone.
    """
    tests = set((tree / "tests/integration").glob("test_*.py"))
    shared = [tree / "pyproject.toml", tree / "tests/conftest.py", tree / "tests/kernels/guest.py"]
    for folder in (tree / part for part in ("agent", "bpf", "dns", "tests/integration", "tests/support")):
        shared += [path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")]
    common = _digest([path for path in shared if path not in tests])
    return {"": common} | {str(path.relative_to(tree)): common + _digest([path]) for path in tests}


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Kept:
    """Results of earlier runs of a row by test file; valid until something changes that they depend on."""

    row: str
    release: str
    digests: dict[str, str]

    @property
    def _path(self) -> Path:
        return RESULTS / f"{self.row}.json"

    def _load(self) -> dict[str, Any]:
        nothing: dict[str, Any] = {"machine": {}, "files": {}}
        try:
            kept: dict[str, Any] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return nothing
        return kept if kept["release"] == self.release else nothing

    def read(self, outcome: Outcome) -> Outcome:
        """Fill in what still holds; without ``release`` where not even what doctor said does."""
        kept = self._load()
        machine = kept["machine"]
        if machine.get("digest") == self.digests[""]:
            outcome.release, outcome.lockdown, outcome.mode = self.release, machine["lockdown"], machine["mode"]
            outcome.programs, outcome.no_healing = machine["programs"], machine["no_healing"]
            outcome.faults = [*_unexpected(outcome), *over_budget(outcome)]
        for file, results in kept["files"].items():
            if results["digest"] == self.digests.get(file):
                outcome.results += [Case(*each) for each in results["tests"]]
        return outcome

    def write(self, outcome: Outcome) -> None:
        """Keep the files of which every test ran and none failed."""
        if not outcome.release:
            return
        kept = self._load()
        machine = {"lockdown": outcome.lockdown, "mode": outcome.mode, "programs": outcome.programs}
        machine["no_healing"] = outcome.no_healing
        kept["release"], kept["machine"] = self.release, {"digest": self.digests[""], **machine}
        request = json.loads((RESULTS / self.row / "request.json").read_text())
        for file in set(request["pytest"]) & self.digests.keys():
            tests = [test for test in outcome.results if test.file == file]
            if tests and not any(test.outcome == "failed" for test in tests):
                results = [(test.name, test.outcome, test.message) for test in tests]
                kept["files"][file] = {"digest": self.digests[file], "tests": results}
        self._path.write_text(json.dumps(kept))


# ---- reading ----


def read(outcome: Outcome, folder: Path) -> None:
    """Fill in what the guest left."""
    result = json.loads((folder / "result.json").read_text())
    outcome.release, outcome.lockdown = result["release"], result["lockdown"]
    outcome.mode = result["doctor"]["mode"] or "none"
    for check in result["doctor"]["checks"]:
        walked = re.search(r"walked (\d+) instructions", check["found"])
        if walked:
            outcome.programs[check["name"]] = int(walked.group(1))
    for name, count in result["heal"]["instructions"].items():  # sockets.c is compiled anew for healing
        if name in outcome.programs.keys() | HEALING:
            outcome.programs[name] = max(count, outcome.programs.get(name, 0))
    outcome.no_healing = result["heal"]["refused"].get("heal4", "")
    outcome.bench = result["bench"]
    if result["pytest"] is not None:
        _read_tests(outcome, folder / "tests.jsonl", result["pytest"])
    outcome.faults += [*_unexpected(outcome), *over_budget(outcome)]


def _read_tests(outcome: Outcome, path: Path, status: int) -> None:
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        outcome.faults.append(f"pytest ended with status {status} ({pytest.ExitCode(status).name}); see {path.parent}")
    if not path.exists():
        return
    found: dict[str, Case] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        known = found.get(line["name"])
        if known is None or known.outcome != "failed":
            said = [part for part in line["message"].splitlines() if part.strip()]
            found[line["name"]] = Case(line["name"], line["outcome"], "\n".join(said[-MESSAGE_LINES:]))
    outcome.results += found.values()


def _unexpected(outcome: Outcome) -> Iterator[str]:
    level = outcome.row.lockdown
    if level is not None and outcome.lockdown != level:
        yield f"lockdown is {outcome.lockdown}, though the kernel was started with {level}"
    mode = "netlink" if outcome.lockdown == "confidentiality" else "packet"
    if outcome.mode != mode:
        yield f"udpwatch's mode is {outcome.mode}; with lockdown {outcome.lockdown} it must be {mode}"
    if missing := sorted(required(outcome) - outcome.programs.keys()):
        yield f"not attached, by doctor's report: {', '.join(missing)}; the tests of what they do were skipped"
    healing = {*HEALING} & outcome.programs.keys()
    if outcome.lockdown == "confidentiality":
        if "kernel is locked down" not in outcome.no_healing:
            yield f"healing needs kernel memory, which may not be read here, but its reason is {outcome.no_healing!r}"
    elif healing != HEALING:
        yield f"replies are not healed: {outcome.no_healing or f'{sorted(HEALING - healing)} missing'}"


def required(outcome: Outcome) -> set[str]:
    """Return the programs that a successful row must have attached: all with a budget, since Debian's kernels allow all
    unless they are locked down. A machine's own kernel may allow less.
    """
    if outcome.row.kernel == NATIVE:
        return {program.name for program in PROGRAMS if program.required} - LEARNING
    if outcome.lockdown == "confidentiality":
        return WITH_HOOKS
    return set(_budgets()[outcome.row.kernel]) - HEALING


def over_budget(outcome: Outcome) -> Iterator[str]:
    """Yield programs without a budget or over it. The machine's own kernel has none, since it may be any."""
    kernel = outcome.row.kernel
    if kernel == NATIVE:
        return
    for program, count in outcome.programs.items():
        budget = _budgets()[kernel].get(program)
        proposal = f"{program} = {_proposal(count):_}"
        if budget is None:
            yield f"no budget for {program} on {kernel}: write `{proposal}` to [{kernel}] of {BUDGET.name}"
        elif count > budget:
            yield (
                f"{program} takes {count:,} of the verifier's {VERIFIER_LIMIT:,} instructions on {kernel}, its budget"
                f" is {budget:,}: make it simpler, or write `{proposal}` to [{kernel}] of {BUDGET.name} and say why"
            )


@cache
def _budgets() -> dict[str, dict[str, int]]:
    return tomllib.loads(BUDGET.read_text())


def _proposal(count: int) -> int:
    """Return a budget with room to grow, rounded to two digits."""
    step = 10 ** max(0, len(str(count)) - 2)
    return math.ceil(count * BUDGET_FACTOR / step) * step


# ---- showing ----

COLUMNS: dict[str, Callable[[Outcome], str]] = {
    "kernel": lambda outcome: outcome.release or outcome.row.name,
    "lockdown": lambda outcome: outcome.lockdown,
    "mode": lambda outcome: outcome.mode,
    "attached": lambda outcome: outcome.attached,
    "heals": lambda outcome: "no" if outcome.no_healing else "yes",
    "tests": lambda outcome: outcome.tests,
    "seconds": lambda outcome: f"{outcome.seconds:.0f}",
}


def as_text(outcomes: Sequence[Outcome]) -> str:
    """Return the table, the programs with their budgets, and all problems."""
    table = [list(COLUMNS), *([show(outcome) for show in COLUMNS.values()] for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines += ["", "instructions that the verifier walked, and the budget:"]
    for outcome in outcomes:
        budgets = _budgets().get(outcome.row.kernel, {})
        counts = (
            f"{program} {count:,} of {budgets.get(program, VERIFIER_LIMIT):,}"
            for program, count in outcome.programs.items()
        )
        lines.append(f"  {outcome.row.name}: {', '.join(counts)}")
    lines += [f"\n{outcome.row.name}: {outcome.bench.strip()}" for outcome in outcomes if outcome.bench]
    for outcome in outcomes:
        for reason, number in Counter(test.message for test in outcome.skipped).items():
            lines += ["", f"{outcome.row.name}: skipped, {number}: {reason}"]
        for test in outcome.failed:
            lines += ["", f"{outcome.row.name}: FAILED {test.name}", textwrap.indent(test.message, "    ")]
        for fault in outcome.faults:
            lines += ["", f"{outcome.row.name}: FAULT {fault}"]
    return "\n".join(lines)


def in_short(attached: str) -> str:
    """Return the attached programs as a short cell of the table."""
    hooks = [program.name for program, _ in HOOKS]
    short = {" ".join(hooks): "cgroup hooks", " ".join(hooks + [program.name for program, _ in FUNCTIONS]): "all"}
    return short.get(attached, attached)


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the table of docs/kernels.md, without what differs between machines."""
    lines = ["| kernel | lockdown | mode | programs | heals | tests |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        series = ".".join(outcome.release.split(".")[:2])
        origin = SUITES.get(outcome.row.kernel, "the machine's own")
        cells = [
            f"{series} ({origin})",
            outcome.lockdown,
            f"`{outcome.mode}`",
            in_short(outcome.attached),
            COLUMNS["heals"](outcome),
            outcome.tests,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def document(outcomes: Sequence[Outcome]) -> None:
    """Write the table into the docs."""
    begin, end = MARKERS
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(before + begin + as_markdown(outcomes) + end + after)


# ---- the command ----


def main() -> int:
    """Return 0 if every row succeeded."""
    parser = argparse.ArgumentParser(description="run the integration tests on other kernels")
    names = [row.name for row in ROWS]
    parser.add_argument("--kernels", type=str.split, default=names, help=f"default: {' '.join(names)}")
    parser.add_argument("--tests", type=str.split, default=EVERYTHING, help=f"default: {' '.join(EVERYTHING)}")
    parser.add_argument(
        "--resume", action="store_true", help="do not run again what passed, where nothing has changed since"
    )
    parser.add_argument("--bench", type=str.split, default=(), help="run these parts of tests/bench instead of tests")
    options = parser.parse_args()
    kernels, tests = options.kernels or names, options.tests or EVERYTHING
    if unknown := set(kernels) - set(names):
        parser.error(f"unknown kernel {' '.join(sorted(unknown))}; there are {' '.join(names)}")
    if os.geteuid():
        parser.error("needs root: run `make test-kernels` as root")
    os.chdir(ROOT)
    rows = [row for row in ROWS if row.name in kernels]
    try:
        with only_one():
            images = {row.kernel: obtain(row.kernel) for row in rows if row.kernel != NATIVE}
            outcomes = asyncio.run(interruptible(run_rows(rows, images, tests, options.bench, options.resume)))
    except Unavailable as error:
        print(f"test-kernels: {error}", file=sys.stderr)
        return 77
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("test-kernels: interrupted", file=sys.stderr)
        return 130
    print(f"\n{as_text(outcomes)}\n")
    if not options.bench and any(kernel != NATIVE for kernel in kernels):
        for name, reason in UNFIT.items():
            print(f"not run in guests: {name}: {reason}")
    if rows == list(ROWS) and tuple(tests) == EVERYTHING and not options.bench:
        document(outcomes)
    return 0 if all(outcome.good for outcome in outcomes) else 1


@contextmanager
def only_one() -> Iterator[None]:
    """Refuse a second run, which would overwrite the first one's files; remove the files of the last run except kept
    results.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in RESULTS.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        yield
    except BlockingIOError:
        raise Unavailable(f"another test-kernels is at work in {RESULTS}: wait for its end") from None
    finally:
        os.close(folder)


async def interruptible(work: Coroutine[Any, Any, list[Outcome]]) -> list[Outcome]:
    """Treat SIGTERM like Ctrl-C."""
    task = asyncio.create_task(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


if __name__ == "__main__":
    sys.exit(main())
