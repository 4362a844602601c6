"""What all kinds of tests share. unit/ needs no root; integration/ needs root and makes its own namespaces."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# pytest-xdist sets the size of a terminal, which `udpwatch top` prefers to that of its own.
for variable in ("COLUMNS", "LINES"):
    os.environ.pop(variable, None)

# A script's job in the background ignores SIGINT, and so would all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


#: They load the machine more than any others, and fill the tables of the session's sensors.
LAST = ("test_pins", "test_hostile_packets", "test_soak", "test_overload", "test_hostile_tenants")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests last that would disturb others. Skip integration tests without root, and say why."""
    items.sort(key=lambda item: LAST.index(item.path.stem) if item.path.stem in LAST else -1)
    if os.geteuid() == 0:
        return
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs root: run `make test` as root"))


#: Tests that need not be alone on the node's hooks; about half of the time of all. Many wait for time-outs.
APART = (
    "unit/",
    "release/",
    *(f"integration/test_{name}" for name in ("dns", "parser_fuzz", "audit", "census", "explain", "image")),
)


class _BesideTheHooks(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types of its classes
    """Run the tests that attach programs to the node's hooks in one process, and the others in another one."""

    def _split_scope(self, nodeid: str) -> str:
        is_apart = nodeid.startswith(tuple(f"tests/{name}" for name in APART))
        uses_hooks = nodeid.startswith(("tests/integration/test_dns_agent", "tests/integration/test_dns_addresses"))
        return "apart" if is_apart and not uses_hooks else "hooks"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Divide the tests between the processes of `make test`."""
    return _BesideTheHooks(config, log)
