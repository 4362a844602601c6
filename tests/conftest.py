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


#: Tests that need not be alone on the node's hooks; about half of the time of all. Many wait for time-outs.
APART = ("unit", "release", "test_dns", "test_parser_fuzz")
#: These, too. They answer wrongly, so they run after those, when most tests that read all events have run.
APART_LAST = ("test_audit", "test_census", "test_explain", "test_image")
#: They load the machine more than any others, and fill the tables of the session's sensors.
LAST = ("test_pins", "test_hostile_packets", "test_soak", "test_overload", "test_hostile_tenants")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests last that would disturb others. Skip integration tests without root, and say why."""
    order = (*APART_LAST, *LAST)
    starts = [(item, next((each for each in order if item.path.stem.startswith(each)), "")) for item in items]
    items[:] = [item for item, start in sorted(starts, key=lambda each: order.index(each[1]) if each[1] else -1)]
    if os.geteuid() == 0:
        return
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs root: run `make test` as root"))


class _BesideTheHooks(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types of its classes
    """Run the tests that attach programs to the node's hooks in one process, and the others in another one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.removeprefix("tests/").removeprefix("integration/")
        is_apart = path.startswith((*APART, *APART_LAST))
        uses_hooks = nodeid.startswith(("tests/integration/test_dns_agent", "tests/integration/test_dns_addresses"))
        return "apart" if is_apart and not uses_hooks else "hooks"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Divide the tests between the processes of `make test`."""
    return _BesideTheHooks(config, log)
