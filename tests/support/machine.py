"""What container runtimes leave on the machine itself, above all cgroups, which have no namespace."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from agents import temporary
from waiting import wait_for

from udpwatch.agent.kernel import cgroup

CGROUPS = Path("/sys/fs/cgroup")
AGENT_MEMORY = 256 << 20  # the chart's limit, for DNS as well
_OWN = "udpwatch-test-"  # and the process that made it
CGROUP_PARENTS = ("docker", "kubepods", "udpwatch-test")  # below which the tests' runtimes make cgroups


@contextlib.contextmanager
def untouched(*names: str) -> Iterator[Path]:
    """Yield a folder with subfolders of these names, for everything that runtimes write; afterwards the machine must be
    as before.
    """
    with temporary() as name:
        place = Path(name)
        for folder in names:
            (place / folder).mkdir()
        before, cgroups = left_behind(place), cgroup_folders()
        yield place
        remove_cgroups(cgroups)
        assert left_behind(place) == before
    assert not place.exists()


@contextlib.contextmanager
def own_cgroup(*children: str) -> Iterator[Path]:
    """Yield a cgroup (v2) for this test alone, with cgroups in it. Cgroups of killed runs are removed, too.

    What a container runtime made of the same name in other hierarchies is removed as well.
    """
    with closing(cgroup.find(None)) as root:
        path = Path(root.path, f"{_OWN}{os.getpid()}")
    for left in path.parent.glob(f"{_OWN}*"):
        if not Path("/proc", left.name.removeprefix(_OWN)).exists():
            _tree_removed(left)
    path.mkdir()
    for name in children:
        (path / name).mkdir()
    try:
        yield path
    finally:
        # cgroup.procs is empty before the last process has ended completely: only rmdir shows that it has.
        for each in {path, *CGROUPS.glob(f"*/{path.name}")}:
            wait_for(lambda each=each: _tree_removed(each), f"{each} to be empty")


@contextlib.contextmanager
def inside_own_cgroup() -> Iterator[Path]:
    """Move this process into a cgroup of its own, so that an agent that watches it counts nothing of others."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (before,) = (line.removeprefix("0::/") for line in lines if line.startswith("0::"))
    with closing(cgroup.find(None)) as root, own_cgroup() as path:
        (path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield path
        finally:
            Path(root.path, before, "cgroup.procs").write_text(str(os.getpid()))


class Limited:
    """The cgroups of a process that has limits, and what the kernel counted of it there."""

    def __init__(self, memory: Path, cpu: Path) -> None:
        self._memory, self._cpu = memory, cpu

    def oom_kills(self) -> int:
        """Processes that were killed because of the limit of memory."""
        (name,) = (each for each in ("memory.events", "memory.oom_control") if (self._memory / each).exists())
        return int(_fields(self._memory / name)["oom_kill"])

    def throttled(self) -> tuple[int, int, float]:
        """(periods of the quota, those of them in which it ran out, seconds that threads waited then)."""
        counted = _fields(self._cpu / "cpu.stat")
        waited = counted.get("throttled_usec", 0) / 1e6 or counted.get("throttled_time", 0) / 1e9
        return counted["nr_periods"], counted["nr_throttled"], waited

    def join(self) -> None:
        """Move the calling process into the same cgroups: it shares the limits."""
        for folder in {self._memory, self._cpu}:
            (folder / "cgroup.procs").write_text(str(os.getpid()))


def _fields(path: Path) -> dict[str, int]:
    return {name: int(value) for name, _, value in (line.partition(" ") for line in path.read_text().splitlines())}


@contextlib.contextmanager
def limited(pid: int, memory_bytes: int, cpus: float | None = None) -> Iterator[Limited]:
    """Put a running process into cgroups with these limits, as a chart sets them. The memory that it has already
    counts.
    """
    made: list[Path] = []
    period_us = 100_000
    left = memory_bytes - (memory_kib(pid, "VmRSS") << 10)  # charges stay with the cgroup that it had before
    quota = -1 if cpus is None else int(cpus * period_us)
    try:
        if (CGROUPS / "memory").is_dir():  # v1
            settings = {
                "memory": {"memory.limit_in_bytes": left},
                "cpu": {"cpu.cfs_period_us": period_us, "cpu.cfs_quota_us": quota},
            }
            folders = {name: CGROUPS / name / f"{_OWN}{os.getpid()}" for name in settings}
        else:
            (CGROUPS / "cgroup.subtree_control").write_text("+memory +cpu")
            settings = {"": {"memory.max": left, "cpu.max": f"{quota if cpus else 'max'} {period_us}"}}
            folders = {"": CGROUPS / f"{_OWN}{os.getpid()}-limited"}
        for name, files in settings.items():
            folders[name].mkdir()
            made.append(folders[name])
            for file, value in files.items():
                (folders[name] / file).write_text(str(value))
            (folders[name] / "cgroup.procs").write_text(str(pid))
        yield Limited(made[0], made[-1])
    finally:
        for folder in made:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                (folder.parent / "cgroup.procs").write_text(str(pid))
            wait_for(lambda folder=folder: _removed(folder), f"{folder} to be empty")


class MemoryCgroup:
    """A cgroup for processes whose memory is to be limited."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_v1 = (folder / "memory.limit_in_bytes").exists()

    def limit(self, limit_bytes: int) -> None:
        """Set the limit. The kernel refuses one below what is in use and cannot be dropped."""
        (self.folder / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")).write_text(str(limit_bytes))

    def used(self) -> int:
        """Return how much is in use, in bytes."""
        return int((self.folder / ("memory.usage_in_bytes" if self._is_v1 else "memory.current")).read_text())


@contextlib.contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """Yield a cgroup with a controller of memory, in v1 or v2, that is removed afterwards."""
    name = f"{_OWN}{os.getpid()}-memory"
    if (CGROUPS / "memory").is_dir():
        folder = CGROUPS / "memory" / name
    else:
        (CGROUPS / "cgroup.subtree_control").write_text("+memory")
        folder = CGROUPS / name
    folder.mkdir()
    try:
        yield MemoryCgroup(folder)
    finally:
        wait_for(lambda: _removed(folder), f"{folder} to be empty")


def memory_kib(pid: int, name: str) -> int:
    """A process's memory: VmRSS what it has, VmHWM the most that it ever had."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found.group(1))


def cgroup_folders() -> set[Path]:
    """Return every cgroup of every hierarchy."""
    return {Path(at) for at, _folders, _files in os.walk(CGROUPS)}


def remove_cgroups(since: set[Path]) -> None:
    """Remove the cgroups that the tests' runtimes have made since, once no process is in them."""
    mine = [folder for folder in cgroup_folders() - since if _is_of_a_test(folder)]
    for folder in sorted(mine, key=lambda path: -len(path.parts)):
        wait_for(lambda folder=folder: _removed(folder), f"{folder} to be empty")


def _is_of_a_test(folder: Path) -> bool:
    """Whether it is in CGROUP_PARENTS or below, in the only hierarchy (v2) or in one of them (v1, hybrid)."""
    return any(part in CGROUP_PARENTS for part in folder.relative_to(CGROUPS).parts[:2])


def _tree_removed(top: Path) -> bool:
    """Remove a cgroup with those in it, if they are empty."""
    folders = [Path(at) for at, _folders, _files in os.walk(top, topdown=False)]
    return False not in [_removed(each) for each in folders]


def _removed(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, OSError):
        folder.rmdir()
    return not folder.exists()


def first_pid(container_id: str) -> int:
    """Return the container's first process as the machine numbers it; its daemon's namespace numbers it differently."""

    def find() -> int:
        found = [int(line) for line in _members(container_id)]
        return min(found, default=0)

    pid: int = wait_for(find, f"a process in the cgroup of {container_id}")
    return pid


def _members(container_id: str) -> Iterator[str]:
    for folder in cgroup_folders():
        if folder.name == container_id:
            with contextlib.suppress(OSError):
                yield from (folder / "cgroup.procs").read_text().split()


def listening(pid: int, port: int) -> None:
    """Wait until a process's network namespace has a socket on the port."""
    wait_for(lambda: f":{port:04X} " in Path(f"/proc/{pid}/net/udp").read_text(), f"a server on port {port}")


def ip_in(pid: int, *lines: str) -> None:
    """Run lines of ip(8) in a process's network namespace."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def name_pod(log: Path, namespace: str, pod: str, uid: str, container: str, container_id: str) -> None:
    """Make what kubelet makes under /var/log for a container."""
    folder = log / "pods" / f"{namespace}_{pod}_{uid}" / container
    folder.mkdir(parents=True)
    (folder / "0.log").touch()
    (log / "containers").mkdir(exist_ok=True)
    link = log / "containers" / f"{pod}_{namespace}_{container}-{container_id}.log"
    link.symlink_to(f"/var/log/pods/{folder.parent.name}/{container}/0.log")


def left_behind(*folders: Path) -> dict[str, Any]:
    """Return everything that a runtime can leave on a machine, with the processes and mounts that use these folders."""
    links = {line.split(": ")[1] for line in _output("ip", "-o", "link").splitlines()}
    places = ("/var/lib/docker", "/var/lib/containerd", "/run/docker", "/run/containerd", "/etc/docker", "/etc/cni")
    return {
        "links": {link for link in links if link.startswith(("docker", "br-", "veth"))},
        "rules": _output("nft", "list", "ruleset"),
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
        "keys": Path("/proc/sys/kernel/keys/root_maxkeys").read_text(),
        "places": {place for place in places if Path(place).exists()},
        "cgroups": {str(path) for path in cgroup_folders() if path.name in CGROUP_PARENTS},
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if _about(line, folders)],
        "processes": [pid for folder in folders for pid in processes_of(folder)],
    }


def processes_of(folder: Path) -> list[int]:
    """Return the processes that have the folder in their command line."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in _text(path)]


def _about(text: str, folders: Sequence[Path]) -> bool:
    return any(str(folder) in text for folder in folders)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
