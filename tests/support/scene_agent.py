"""An agent that runs on the node of a scene."""

from __future__ import annotations

from pathlib import Path

from agents import Agent

from udpwatch.agent.kernel import netns
from udpwatch.agent.testing.lab import ContainerHost, die_with_parent


class InNamespace(Agent):
    """An agent in the node's network namespace; its HTTP endpoints are requested there, too."""

    def __init__(self, scene: ContainerHost, folder: Path, *flags: str, ready: bool = True) -> None:
        self.scene = scene
        namespace = scene.node.path

        def enter() -> None:
            with open(namespace, "rb") as file:  # noqa: PTH123  a child: as little as possible
                netns.setns(file.fileno())
            die_with_parent()

        super().__init__(folder, "--dns", *flags, ready=ready, preexec_fn=enter)

    def get(self, path: str) -> tuple[int, str]:
        with self.scene.node.entered():
            return super().get(path)
