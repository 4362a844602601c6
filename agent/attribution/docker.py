"""From a container's id to the name that Docker gave it, by the file that Docker keeps of it."""

from __future__ import annotations

import json
from pathlib import Path

from udpwatch.agent.attribution.cache import Cache
from udpwatch.agent.attribution.container import MAX_LABEL
from udpwatch.agent.kernel.records import printable

MAX_CONTAINERS = 4096
KEEP_SECONDS = 60.0  # docker rename
MAX_FILE_BYTES = 1 << 20  # usual are 5 KB; labels and environment come on top


class DockerNames:
    """Looks containers up in Docker's folder."""

    def __init__(self, docker_root: Path = Path("/var/lib/docker")) -> None:
        self._containers = docker_root / "containers"
        self._cache: Cache[str, str] = Cache(MAX_CONTAINERS, KEEP_SECONDS)

    def lookup(self, container_id: str, now: float) -> str:
        """A container's name, "" where Docker has none. ``now``: monotonic seconds."""
        known = self._cache.get(container_id, now)
        return known if known is not None else self._cache.put(container_id, self._read(container_id), now)

    def _read(self, container_id: str) -> str:
        try:
            with (self._containers / container_id / "config.v2.json").open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            name = json.loads(raw)["Name"] if len(raw) <= MAX_FILE_BYTES else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or not what Docker writes
            return ""
        if not isinstance(name, str):
            return ""
        return printable(name.removeprefix("/").encode(errors="backslashreplace"))[:MAX_LABEL]
