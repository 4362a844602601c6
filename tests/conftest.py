"""What all kinds of tests share. unit/ needs no root; integration/ needs root and makes its own namespaces."""

from __future__ import annotations

import os
import signal

import pytest

# A script's job in the background ignores SIGINT, and so would all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip integration tests without root, and say why."""
    if os.geteuid() == 0:
        return
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs root: run `make test` as root"))
