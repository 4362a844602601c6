"""The systemd unit under a real systemd, which is process 1 of its own namespaces and knows only this unit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from agents import temporary
from machine import cgroup_folders, remove_cgroups
from pods import blocks, counted
from repository import DOCS
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.kernel import cgroup
from udpwatch.agent.kernel.capabilities import Capability
from udpwatch.agent.testing.lab import ContainerHost, die_with_parent

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "agent/udpwatch.service"
SYSTEMD = Path("/lib/systemd/systemd")
OPT = "opt/udpwatch"
CGROUP = "udpwatch-test"  # one of machine.CGROUP_PARENTS

pytestmark = pytest.mark.skipif(not SYSTEMD.exists(), reason="no systemd here: apt-get install systemd")

#: What the unit refers to, empty: the machine's own would start half of it.
_TARGETS = ("sysinit", "basic", "shutdown", "network", "umount")
_MOUNT = f"""
mount -t tmpfs none /opt
mkdir /{OPT}
mount --bind {{place}}/{OPT} /{OPT}
"""
_INSTALL = f"""{_MOUNT}
/usr/bin/python3 -m venv --system-site-packages /{OPT}
/{OPT}/bin/pip install -q --disable-pip-version-check --no-index --find-links={{place}}/wheels {{constraint}} udpwatch
"""
_BPFFS = "mount -t bpf -o mode=700 none /sys/fs/bpf"  # as systemd does on a machine of its own
_NO_BPFFS = "! mountpoint -q /sys/fs/bpf || umount --lazy /sys/fs/bpf"
_BOOT = f"""{_MOUNT}
mount -t tmpfs none /run
mount -t tmpfs none /var/cache
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
{{bpffs}}
exec {SYSTEMD} --system --unit=test.target --show-status=no
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with what docs/systemd.md installs, and the unit."""
    with temporary() as name:
        place = Path(name)
        _install(place)
        units = place / "units"
        units.mkdir()
        for target in _TARGETS:
            (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (units / "test.target").write_text("[Unit]\nDefaultDependencies=no\nWants=udpwatch.service\n")
        shutil.copy(UNIT, units)
        yield place


def _install(place: Path) -> None:
    """Make /opt/udpwatch of this folder: an environment names its own path. Packages are fetched first, since /opt may
    be where this machine's pip takes them from.
    """
    (place / OPT).mkdir(parents=True)
    source, wheels = place / "source", place / "wheels"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)  # setuptools leaves its build folder beside what it builds
    constraint = ["--constraint", str(ROOT / "constraints.txt")]
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *constraint, f"--wheel-dir={wheels}", source], check=True, capture_output=True)
    script = _INSTALL.format(place=place, constraint=shlex.join(constraint))
    subprocess.run(["unshare", "--mount", "sh", "-ec", script], check=True, capture_output=True)
    assert (place / OPT / "bin/udpwatch").exists()


class Systemd:
    """A systemd in the network of a host of the lab, with the unit and a drop-in."""

    def __init__(self, place: Path, host: ContainerHost, drop_in: str = "", bpffs: str = _BPFFS) -> None:
        """The unit's agent is ready when it returns."""
        # No journal is there to read.
        self._said = place / "said"
        self._said.write_text("")
        said = f"[Service]\nStandardError=append:{self._said}\n"
        (place / "units/udpwatch.service.d").mkdir(exist_ok=True)
        (place / "units/udpwatch.service.d/test.conf").write_text(said + drop_in)
        self._before = cgroup_folders()
        with closing(cgroup.find(None)) as root:
            self._cgroup = Path(root.path, CGROUP, "systemd")
        self._cgroup.mkdir(parents=True, exist_ok=True)
        self._host = host
        own = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*own, "sh", "-ec", _BOOT.format(place=place, bpffs=bpffs)],
            env={"container": CGROUP, "SYSTEMD_UNIT_PATH": str(place / "units"), "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=self._enter,
        )
        try:
            wait_for(lambda: "udpwatch: ready" in self.said or self.process.poll() is not None, "the unit to be ready")
            assert self.process.poll() is None
        except BaseException:
            self.close()
            raise

    def _enter(self) -> None:
        self._host.node.enter_in_child()
        die_with_parent()
        (self._cgroup / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def _one(self) -> str:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().strip()

    @property
    def pid(self) -> int:
        """Of the unit's main process."""
        return min(map(int, (self._cgroup / "system.slice/udpwatch.service/cgroup.procs").read_text().split()))

    @property
    def said(self) -> list[str]:
        """What the unit has written."""
        return self._said.read_text().splitlines()

    def systemctl(self, *arguments: str) -> str:
        """What its own systemctl says."""
        command = ["nsenter", f"--target={self._one}", "--mount", "--pid", "systemctl", *arguments]
        environment = {**os.environ, "SYSTEMD_IGNORE_CHROOT": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
        return (done.stdout + done.stderr).strip()

    def status(self) -> dict[str, str]:
        """/proc/PID/status of the agent."""
        return dict(re.findall(r"^(\w+):\s+(.+)$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE))

    def has(self, field: str) -> set[str]:
        """A set of capabilities of the agent's; whatever has no name here is a number."""
        mask, names = int(self.status()[field], 16), {int(each): each.name for each in Capability}
        return {names.get(number, str(number)) for number in range(64) if mask >> number & 1}

    def close(self) -> None:
        """End it with all that it has started."""
        self.process.kill()
        self.process.wait()
        remove_cgroups(self._before)


@pytest.fixture(scope="module")
def systemd(place: Path, host: ContainerHost) -> Iterator[Systemd]:
    with closing(Systemd(place, host)) as running:
        yield running


@pytest.fixture(scope="module")
def documented() -> list[str]:
    """Return the drop-ins of docs/systemd.md."""
    return [block for block in blocks(DOCS / "systemd.md") if block.startswith("[Service]")]


def wrong_reply(host: ContainerHost, port: int) -> str:
    """Send a wrong reply; returns the verdict that the unit's agent counts it with."""
    wrong_replies(host, port)
    return counted(host.node, port, "127.0.0.1")["verdict"]


def test_systemd_analyze_accepts_the_unit(place: Path) -> None:
    """All names, values and references are valid."""
    script = f"mount -t tmpfs none /opt; mkdir /{OPT}; mount --bind {place}/{OPT} /{OPT}; systemd-analyze verify {UNIT}"
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_exposure_score_is_the_documented_one() -> None:
    """systemd's own score is that of docs/systemd.md."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Overall exposure level for udpwatch.service: ([\d.]+) OK", done.stdout)
    assert found, done.stdout
    version = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    scores = dict(re.findall(r"([\d.]+) of 10 with (?:systemd )?(\d+)", (DOCS / "systemd.md").read_text()))
    assert scores.get(found.group(1)) == version


def test_agent_works_in_the_unit(systemd: Systemd, host: ContainerHost, port: int) -> None:
    """The compiler works, too: nothing was compiled before."""
    assert any("mode packet" in line for line in systemd.said)
    assert wrong_reply(host, port) == "new"
    assert systemd.systemctl("is-active", "udpwatch") == "active"
    shown = systemd.systemctl("show", "--property=Type,WatchdogUSec", "udpwatch").splitlines()
    assert sorted(shown) == ["Type=notify", "WatchdogUSec=1min"]


def test_agent_in_the_unit_has_minimal_rights(systemd: Systemd) -> None:
    """It has the unit's capabilities, fewer once it runs, and a file system with three writable folders."""
    assert systemd.has("CapBnd") == {"BPF", "NET_ADMIN", "PERFMON"}
    assert systemd.has("CapEff") == {"BPF", "NET_ADMIN"}
    status = systemd.status()
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    root = Path(f"/proc/{systemd.pid}/root")
    looked = "run/udpwatch", "var/cache/udpwatch", "run", "usr", "etc", "var/lib", "proc/sys/net", "sys/fs/cgroup"
    looked += "sys/fs/bpf", "sys/fs/bpf/udpwatch"
    written = {path for path in looked if not os.statvfs(root / path).f_flag & os.ST_RDONLY}
    assert written == {"run/udpwatch", "var/cache/udpwatch", "sys/fs/bpf/udpwatch"}
    assert (root / "var/cache/udpwatch").stat().st_mode & 0o777 == 0o700
    assert list((root / "var/cache/udpwatch").iterdir())
    assert not os.access(root / "root/.profile", os.F_OK)


def test_counts_survive_a_restart_of_the_unit(systemd: Systemd, host: ContainerHost, port: int) -> None:
    wrong_reply(host, port)
    first = systemd.pid
    systemd.systemctl("stop", "udpwatch")
    wrong_replies(host, port, 4)
    systemd.systemctl("start", "udpwatch")
    assert systemd.pid != first
    assert any("goes on with the counts" in line for line in systemd.said)
    assert counted(host.node, port, "127.0.0.1", times=5)["verdict"] == "new"


def test_unit_stops(systemd: Systemd) -> None:
    systemd.systemctl("stop", "udpwatch")
    told = systemd.systemctl("show", "--property=ActiveState,Result,ExecMainStatus", "udpwatch").splitlines()
    assert sorted(told) == ["ActiveState=inactive", "ExecMainStatus=0", "Result=success"]


def test_watchdog_restarts_an_agent_without_samples(place: Path, host: ContainerHost, port: int) -> None:
    """The agent is stopped, so it takes no samples and handles no signals."""
    with closing(Systemd(place, host, "WatchdogSec=2\nTimeoutAbortSec=1\nRestartSec=0\n")) as running:
        first = running.pid
        wrong_reply(host, port)
        assert running.systemctl("show", "--property=NRestarts", "udpwatch") == "NRestarts=0"
        os.kill(first, signal.SIGSTOP)
        wait_for(lambda: running.said.count("udpwatch: ready") == 2, "the second start")
        assert running.pid != first
        assert running.systemctl("show", "--property=NRestarts", "udpwatch") == "NRestarts=1"


def test_drop_in_enables_dns(place: Path, host: ContainerHost, documented: list[str], port: int) -> None:
    (drop_in,) = (block for block in documented if "NET_BIND_SERVICE" in block)
    with closing(Systemd(place, host, f"{drop_in}\nEnvironment=UDPWATCH_DNS=on\n")) as running:
        assert any("port 53" in line for line in running.said), running.said
        assert running.has("CapEff") == {"BPF", "NET_ADMIN", "NET_BIND_SERVICE"}
        assert wrong_reply(host, port) == "new"


def test_drop_in_enables_mode_netlink(place: Path, host: ContainerHost, documented: list[str], port: int) -> None:
    (drop_in,) = (block for block in documented if "SYS_PTRACE" in block)
    without_types = "Environment=UDPWATCH_BTF=/etc/hostname"
    with closing(Systemd(place, host, f"{drop_in}\n{without_types}\n", bpffs=_NO_BPFFS)) as running:
        assert any("cannot use the state folder /sys/fs/bpf/udpwatch" in line for line in running.said)
        assert running.has("CapEff") == {"BPF", "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"}
        assert wrong_reply(host, port) == "unknown"
