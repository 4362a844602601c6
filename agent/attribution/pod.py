"""From a container's id to its pod, by the names that kubelet gives to log files.

/var/log/containers/POD_NAMESPACE_CONTAINER-ID.log is a link for each container, and /var/log/pods/NAMESPACE_POD_UID/
a folder for each pod, with a folder for each container in it. Only names are read, never a log.
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

MAX_NAMES = 16_384  # a node has 110 pods, unless told otherwise
_SETTLED_SECONDS = 2.0  # a folder's time is coarse: what came within it may have left it as it was
# Kubernetes' names have no "_", and a log file's name that is too long is cut, the id with it.
_CONTAINER = re.compile(r"(?P<pod>[^_]+)_(?P<namespace>[^_]+)_(?P<container>[^_]+)-(?P<id>[0-9a-f]{64})\.log")
_POD = re.compile(r"(?P<namespace>[^_]+)_(?P<pod>[^_]+)_(?P<id>[0-9a-f-]{32,36})")


@dataclass(frozen=True, slots=True)
class Pod:
    """Kubernetes' names of a container; "": not known."""

    namespace: str
    pod: str
    container: str = ""


class _Folder:
    """The names in a folder, read again when the folder has changed."""

    def __init__(self, path: Path, pattern: re.Pattern[str], clock: Callable[[], float]) -> None:
        self._path, self._pattern, self._clock = path, pattern, clock
        self._names: dict[str, dict[str, str]] = {}
        self._changed = 0  # the folder's time when it was read, 0: may have changed since

    def get(self, key: str) -> dict[str, str] | None:
        """The parts of the name that has this id."""
        found = self._names.get(key)
        if found is None and self._read():
            found = self._names.get(key)
        return found

    def _read(self) -> bool:
        try:
            changed = self._path.stat().st_mtime_ns
            if changed == self._changed:
                return False
            # What has gone stays until the next miss: a container that has just ended is asked for, too.
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
    """Looks containers up in the folders of their logs; it remembers no more than those folders hold."""

    def __init__(self, log_root: Path = Path("/var/log"), clock: Callable[[], float] = time.time) -> None:
        self._pods_folder = log_root / "pods"
        self._containers = _Folder(log_root / "containers", _CONTAINER, clock)
        self._pods = _Folder(self._pods_folder, _POD, clock)

    def lookup(self, container_id: str, pod_uid: str) -> Pod | None:
        """The names of a container, by its id, else by its pod's; None where there are none."""
        found = self._containers.get(container_id) if container_id else None
        if found:
            return Pod(found["namespace"], found["pod"], found["container"])
        found = self._pods.get(pod_uid) if pod_uid else None
        if found:
            return Pod(found["namespace"], found["pod"], self._only_container(found))
        return None

    def _only_container(self, pod: dict[str, str]) -> str:
        """The name of the pod's container, "" where it has several."""
        folder = self._pods_folder / f"{pod['namespace']}_{pod['pod']}_{pod['id']}"
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in islice(entries, 2)]
        except OSError:
            return ""
        return printable(os.fsencode(names[0])) if len(names) == 1 else ""
