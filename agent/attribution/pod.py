"""Find the pod of a container by the names that kubelet gives to log files.

/var/log/containers/POD_NAMESPACE_CONTAINER-ID.log is a link for each container. /var/log/pods/NAMESPACE_POD_UID/ is a
directory for each pod, with one directory per container. Only names are read, never a log.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from udpwatch.agent.kernel.records import printable

MAX_NAMES = 16_384  # a node runs at most 110 pods by default
_SETTLED_SECONDS = 2.0  # modification times are coarse: a later change may leave the time as it was
# Kubernetes' names have no "_". A log file's name that is too long is cut, including the id.
_CONTAINER = re.compile(r"(?P<pod>[^_]+)_(?P<namespace>[^_]+)_(?P<container>[^_]+)-(?P<id>[0-9a-f]{64})\.log")
_POD = re.compile(r"(?P<namespace>[^_]+)_(?P<pod>[^_]+)_(?P<id>[0-9a-f-]{32,36})")


@dataclass(frozen=True, slots=True)
class Pod:
    """Kubernetes' names of a container; "": unknown."""

    namespace: str
    pod: str
    container: str = ""


class _Folder:
    """The names in a directory, read again when the directory has changed."""

    def __init__(self, path: Path, pattern: re.Pattern[str], clock: Callable[[], float]) -> None:
        self._path, self._pattern, self._clock = path, pattern, clock
        self._names: dict[str, dict[str, str]] = {}
        self._changed = 0  # the directory's modification time when it was read; 0: read it again

    def get(self, key: str) -> dict[str, str] | None:
        """Return the parts of the name that contains this id."""
        found = self._names.get(key)
        if found is None and self._read():
            found = self._names.get(key)
        return found

    def _read(self) -> bool:
        try:
            changed = self._path.stat().st_mtime_ns
            if changed == self._changed:
                return False
            # Removed names stay until the next miss, because a container that has just ended is looked up, too.
            self._names = {parts["id"]: parts for parts in self._list()}
        except OSError:
            self._changed = 0
            return False
        self._changed = changed if self._clock() - changed / 1e9 > _SETTLED_SECONDS else 0
        return True

    def _list(self) -> Iterator[dict[str, str]]:
        with os.scandir(self._path) as entries:
            for entry in islice(entries, MAX_NAMES):
                found = self._pattern.fullmatch(entry.name)
                if found:
                    yield {name: printable(os.fsencode(part)) for name, part in found.groupdict().items()}


class Pods:
    """Looks up pods in the directories of container logs; it caches no more than those directories hold."""

    def __init__(self, log_root: Path = Path("/var/log"), clock: Callable[[], float] = time.time) -> None:
        self._pods_folder = log_root / "pods"
        self._containers = _Folder(log_root / "containers", _CONTAINER, clock)
        self._pods = _Folder(self._pods_folder, _POD, clock)

    def lookup(self, container_id: str, pod_uid: str) -> Pod | None:
        """Return the names of a container by its own id, else by its pod's uid; None if neither is known."""
        found = self._containers.get(container_id) if container_id else None
        if found:
            return Pod(found["namespace"], found["pod"], found["container"])
        found = self._pods.get(pod_uid) if pod_uid else None
        if found:
            return Pod(found["namespace"], found["pod"], self._only_container(found))
        return None

    def _only_container(self, pod: dict[str, str]) -> str:
        """Return the name of the pod's container, or "" if it has several."""
        folder = self._pods_folder / f"{pod['namespace']}_{pod['pod']}_{pod['id']}"
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in islice(entries, 2)]
        except OSError:
            return ""
        return printable(os.fsencode(names[0])) if len(names) == 1 else ""
