"""Run other programs."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from errors import ReleaseError


def run(command: Sequence[str], task: str, hint: str = "", environment: Mapping[str, str] | None = None) -> None:
    """Run a program; if it fails, raise ReleaseError: cannot TASK, its last words, the hint."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
        raise ReleaseError(f"cannot {task}: {words[-1].strip()}{'; ' + hint if hint else ''}")
