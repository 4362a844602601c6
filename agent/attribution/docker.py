"""Find the name of a Docker container in the file that Docker keeps for it."""

from __future__ import annotations

import json
from pathlib import Path

from udpwatch.agent.attribution.cache import TtlCache
from udpwatch.agent.attribution.container import MAX_LABEL
from udpwatch.agent.kernel.records import printable

MAX_CONTAINERS = 4096
KEEP_SECONDS = 60.0  # `docker rename` may change a name
MAX_FILE_BYTES = 1 << 20  # usually 5 KB, plus labels and environment


class DockerNames:
    """Looks up container names in Docker's data directory."""

    def __init__(self, docker_root: Path = Path("/var/lib/docker")) -> None:
        self._containers = docker_root / "containers"
        self._cache: TtlCache[str, str] = TtlCache(MAX_CONTAINERS, KEEP_SECONDS)

    def lookup(self, container_id: str, now: float) -> str:
        """Return a container's name, or "" if Docker has none. ``now``: monotonic seconds."""
        known = self._cache.get(container_id, now)
        return known if known is not None else self._cache.put(container_id, self._read(container_id), now)

    def _read(self, container_id: str) -> str:
        try:
            with (self._containers / container_id / "config.v2.json").open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            name = json.loads(raw)["Name"] if len(raw) <= MAX_FILE_BYTES else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no such file, or not Docker's format
            return ""
        if not isinstance(name, str):
            return ""
        return printable(name.removeprefix("/").encode(errors="backslashreplace"))[:MAX_LABEL]
