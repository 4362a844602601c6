"""The limit of open files, raised in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from udpwatch.agent.kernel.rlimits import raise_descriptor_limit
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(raise_descriptor_limit(wanted), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "wanted", "result"),
    [(64, 128, "True 128 256"), (64, 256, "True 256 256"), (64, 257, "False 256 256"), (200, 128, "True 200 256")],
    ids=["raised", "to the hard limit", "not beyond the hard limit", "never lowered"],
)
def test_raise_descriptor_limit(soft: int, wanted: int, result: str) -> None:
    command = [sys.executable, "-P", "-c", CODE, str(soft), "256", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == result
