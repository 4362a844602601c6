"""A plugin of pytest (`-p heal_everywhere`): during the tests, replies are healed from all ports, in all namespaces of
the labs. What was right without healing must be right with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from healing import ALL_PORTS, ON, Healing

from udpwatch.agent.testing.lab import Namespace


@pytest.fixture(scope="session", autouse=True)
def _heal_everywhere(cache: object) -> Iterator[None]:
    """Heal; ``cache`` is where compiled programs are."""
    create, end = Namespace.__init__, Namespace.close
    with Healing() as healing:
        healing.set_mode(ALL_PORTS, ON)

        def created(self: Namespace, name: str) -> None:
            create(self, name)
            healing.follow(self)

        def ended(self: Namespace) -> None:
            healing.leave(self)
            end(self)

        Namespace.__init__, Namespace.close = created, ended  # type: ignore[method-assign]
        yield
        Namespace.__init__, Namespace.close = create, end  # type: ignore[method-assign]
        print(f"refused: {healing.refused()}")
