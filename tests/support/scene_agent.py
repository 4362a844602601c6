"""An agent that runs on the node of a scene."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents import Agent

from udpwatch.agent.testing.lab import ContainerHost


class NodeAgent(Agent):
    """An agent in the node's network namespace, like one with the host's network."""

    def __init__(self, host: ContainerHost, folder: Path, *flags: str) -> None:
        self._node = host.node
        with self._node.entered():
            super().__init__(folder, *flags)

    def get(self, path: str) -> tuple[int, str]:
        """Send an HTTP request from that namespace."""
        with self._node.entered():
            return super().get(path)


class InNamespace(Agent):
    """An agent in the node's network namespace; its HTTP endpoints are requested there, too."""

    def __init__(self, scene: ContainerHost, folder: Path, *flags: str, ready: bool = True, **options: Any) -> None:
        self.scene = scene
        super().__init__(folder, "--dns", *flags, ready=ready, preexec_fn=scene.node.enter_in_child, **options)

    def get(self, path: str) -> tuple[int, str]:
        with self.scene.node.entered():
            return super().get(path)
