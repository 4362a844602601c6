"""What all kinds of tests share. unit/ needs no root; integration/ needs root and makes its own namespaces."""

from __future__ import annotations

import os
import signal

import pytest

# A script's job in the background ignores SIGINT, and so would all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Before pytest-xdist, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide the tests between two processes, and skip integration tests without root.

    The tests of the responder wait for time-outs most of the time, so the others run beside them.
    """
    for item in items:
        is_dns = "dns" in item.path.parts or item.path.name.startswith("test_dns")
        item.add_marker(pytest.mark.xdist_group("dns" if is_dns else "agent"))
    if os.geteuid() == 0:
        return
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs root: run `make test` as root"))
