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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip integration tests without root, and say why."""
    if os.geteuid() == 0:
        return
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs root: run `make test` as root"))


class _BesideTheHooks(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types of its classes
    """Run the tests that attach programs to the node's hooks in one process, and the others in another one: the unit
    tests, the packet parser's, those of a release, and those of the DNS responder, most of which wait for time-outs.
    """

    def _split_scope(self, nodeid: str) -> str:
        names = "unit/", "release/", "integration/test_dns", "integration/test_parser_fuzz"
        is_apart = nodeid.startswith(tuple(f"tests/{name}" for name in names))
        uses_hooks = nodeid.startswith(("tests/integration/test_dns_agent", "tests/integration/test_dns_addresses"))
        return "apart" if is_apart and not uses_hooks else "hooks"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Divide the tests between the processes of `make test`."""
    return _BesideTheHooks(config, log)
