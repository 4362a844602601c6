"""Runs on the kernel that is tried, in a guest or natively: asks doctor, runs the tests, writes down what came of it.

``guest.py FOLDER``: FOLDER outlives the guest. request.json in it holds pytest's arguments, the folders to be cached,
and which of the matrix's kernels this is ("": none). ``started`` says that the kernel has booted; tests.jsonl gets a
line for each test as it ends; result.json comes last and is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from udpwatch.agent.kernel import cgroup, loader

SHARE_TAG = "root"
#: programs and libraries, which every process of every test reads
HOT = ("/usr/bin", "/usr/sbin", "/usr/lib/python3", sysconfig.get_path("stdlib"), "/usr/lib/x86_64-linux-gnu")


def main(folder: Path) -> int:
    """Record what happens; the host judges it. Returns 0 when result.json is written."""
    (folder / "started").touch()
    request = json.loads((folder / "request.json").read_text())
    if request["cached"]:
        prepare(request["cached"])
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = "/tmp/hypothesis"
    if request["kernel"]:
        os.environ["UDPWATCH_TEST_KERNEL"] = request["kernel"]  # tests/integration/conftest.py
    arguments: list[str] = request["pytest"]
    result = {
        "release": os.uname().release,
        "lockdown": lockdown(),
        "doctor": doctor(),
        "heal": heal(),
        "bench": bench(request["bench"]) if request["bench"] else "",
        # None: no tests were asked for.
        "pytest": int(pytest.main(["-p", "no:cacheprovider", *arguments], [Record(folder / "tests.jsonl")]))
        if arguments
        else None,
    }
    unfinished = folder / "result.json.part"
    unfinished.write_text(json.dumps(result))
    unfinished.rename(folder / "result.json")
    return 0


class Record:
    """A pytest plugin that writes each result at once, so that a guest that dies leaves its results."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a line; a test that also fails in its teardown has two."""
        if report.passed and report.when != "call":
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        line = {"name": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "message": reason}
        print(json.dumps(line), file=self._file, flush=True)


def prepare(cached: Sequence[str]) -> None:
    """Make a guest like a machine: these folders are cached, and /dev/net/tun is there, for which udev cares else.

    What costs time under emulation goes: the kernel's messages on a serial line, and what .pth files add to each start
    of Python; PYTHONPATH names the checkout.
    """
    subprocess.run(["dmesg", "--console-level", "alert"], check=True)
    share = Path("/run/share")
    share.mkdir()
    options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro"
    subprocess.run(["mount", "-t", "9p", "-o", options, SHARE_TAG, share], check=True)
    for folder in cached:
        subprocess.run(["mount", "--bind", f"{share}{folder}", folder], check=True)
    for added in (path for folder in site.getsitepackages() for path in Path(folder).glob("*.pth")):
        subprocess.run(["mount", "--bind", "/dev/null", added], check=True)
    subprocess.run(["modprobe", "tun"], check=True)


def bench(parts: Sequence[str]) -> str:
    """Return the output of parts of tests/bench."""
    command = [sys.executable, "tests/bench/bench.py", *parts]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def lockdown() -> str:
    """Return the level as the kernel names it; "none" also when the kernel has no lockdown."""
    read = "mount -t securityfs none /sys/kernel/security 2>/dev/null; cat /sys/kernel/security/lockdown"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", read], capture_output=True, text=True, check=False)
    return done.stdout.partition("[")[2].partition("]")[0] or "none"


def heal() -> dict[str, dict[str, Any]]:
    """Load what heals replies, which doctor does not: return the instructions of all programs, and why some are
    refused.
    """
    with contextlib.closing(cgroup.find(None)) as root:
        held = loader.load(root, loader.Limits(), heal=True)
    for descriptors in (held.links, held.programs, held.maps):
        for descriptor in descriptors.values():
            os.close(descriptor)
    return {"instructions": held.instructions, "refused": held.refused}


def doctor() -> dict[str, Any]:
    """Return doctor's report; raises RuntimeError with its output when there is none."""
    command = [sys.executable, "-m", "udpwatch.agent.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RuntimeError(f"udpwatch doctor --json ended with status {done.returncode}: {done.stderr}") from None
    return report


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
