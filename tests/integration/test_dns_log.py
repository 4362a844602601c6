"""The log of `udpwatch dns` in a file and in syslog, beside dnsmasq, and the user that it changes to."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dns_server import FakeServer, Responder, ask, bare_query, connected, needs, texts
from dnsmasq import dnsmasq
from waiting import wait_for

from udpwatch.agent.testing.child import COMMAND
from udpwatch.agent.testing.lab import Lab, Namespace

NOBODY = pwd.getpwnam("nobody")
OPTIONS = ("--host-record=ready.example,192.0.2.1", "--log-queries", "--keep-in-foreground")
#: NAME[PID] of a line, after its time
LINE = re.compile(r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d (\w+)\[(\d+)\]: (.*)")


@pytest.fixture(scope="module")
def node() -> Iterator[Namespace]:
    with Lab() as built:
        node = built.namespace("node")
        node.ip("link set lo up")
        yield node


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can enter, and only nobody writes to."""
    path = Path(tempfile.mkdtemp(prefix="udpwatch-log-", dir="/var/tmp"))
    path.chmod(0o755)
    os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def logging_to(node: Namespace, target: Path, *options: str, user: str = "nobody") -> Iterator[Responder]:
    """A responder that logs to a file, once it is ready."""
    responder = Responder(node, f"--log-facility={target}", f"--user={user}", *OPTIONS, *options, ready=False)
    try:
        wait_for(lambda: responder.process.poll() is not None or said(target)[-1:] == ["ready"], "it to be ready")
        assert responder.process.poll() is None, responder.log
        yield responder
        assert responder.stop() == 0
    finally:
        responder.stop(signal.SIGKILL)


def said(file: Path, program: str = "udpwatch") -> list[str]:
    """The lines of a log, without what precedes the text."""
    lines = [LINE.fullmatch(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert all(line and line[1] == program for line in lines), lines
    return [line[3] for line in lines if line]


def is_logged(node: Namespace, file: Path, name: str) -> None:
    ask(node, "127.0.0.1", name)
    wait_for(lambda: any(line.startswith(f"query[A] {name}") for line in said(file)), f"{name} in the log")


def test_file_is_that_of_dnsmasq(node: Namespace, folder: Path) -> None:
    """The same lines, owner and permissions; appended."""
    ours, theirs = folder / "ours.log", folder / "theirs.log"
    with logging_to(node, ours) as responder:
        ask(node, "127.0.0.1", "ready.example")
        assert responder.log == []
    assert said(ours)[-2:] == ["query[A] ready.example from 127.0.0.1", "config ready.example is 192.0.2.1"]
    with dnsmasq(node, f"--log-facility={theirs}", *OPTIONS[:2]):
        ask(node, "127.0.0.1", "ready.example")
        wait_for(lambda: len([line for line in said(theirs, "dnsmasq") if "query" in line]) == 2, "the lines")
    assert said(theirs, "dnsmasq")[-2:] == [
        "query[A] ready.example from 127.0.0.1",
        "config ready.example is 192.0.2.1",
    ]
    with logging_to(node, ours):
        pass
    assert said(ours).count("ready") == 2
    assert ours.stat().st_uid == theirs.stat().st_uid == NOBODY.pw_uid
    assert ours.stat().st_mode & 0o777 == 0o640


def test_file_in_a_folder_of_root_is_opened_before_root_is_given_up(node: Namespace, folder: Path) -> None:
    os.chown(folder, 0, 0)
    file, former = folder / "dns.log", folder / "dns.log.1"
    with logging_to(node, file) as responder:
        assert file.stat().st_uid == NOBODY.pw_uid
        file.rename(former)
        responder.process.send_signal(signal.SIGUSR2)
        wait_for(lambda: responder.has_logged(f"cannot open log {file} again: Permission denied"), "the problem")
        is_logged(node, former, "a.example")  # none is lost
        file.touch()
        os.chown(file, NOBODY.pw_uid, -1)  # `create 640 nobody` of logrotate
        responder.process.send_signal(signal.SIGUSR2)
        time.sleep(0.1)
        is_logged(node, file, "b.example")


def test_rotation(node: Namespace, folder: Path) -> None:
    file, former = folder / "dns.log", folder / "dns.log.1"
    with logging_to(node, file) as responder:
        file.rename(former)
        is_logged(node, former, "a.example")
        responder.process.send_signal(signal.SIGUSR2)
        wait_for(file.exists, "the new file")
        is_logged(node, file, "b.example")
        file.unlink()
        wait_for(lambda: ask(node, "127.0.0.1", "c.example") and file.exists(), "a file after it was removed")
        assert responder.metric("log_lines_lost_total") == 0
        assert responder.log == []


def test_another_users_link_is_not_followed_by_root(node: Namespace, folder: Path) -> None:
    """A user who may write to the folder must not choose which file root opens and gives away."""
    victim = Path(tempfile.mkdtemp(prefix="udpwatch-log-", dir="/var/tmp")) / "victim"
    victim.write_text("precious\n")
    victim.chmod(0o600)
    victim.parent.chmod(0o755)
    file = folder / "dns.log"
    file.symlink_to(victim)
    try:
        responder = Responder(node, f"--log-facility={file}", "--user=nobody", *OPTIONS, ready=False)
        assert responder.process.wait(60) == 3
        responder.stop()
        assert f"log-facility: cannot open {file}: Permission denied" in responder.log[-1]
        assert (victim.read_text(), victim.stat().st_uid) == ("precious\n", 0)
    finally:
        shutil.rmtree(victim.parent)


@pytest.mark.parametrize("name", ["missing/dns.log", "."])
def test_file_that_cannot_be_opened(node: Namespace, folder: Path, name: str) -> None:
    responder = Responder(node, f"--log-facility={folder}/{name}", *OPTIONS, ready=False)
    assert responder.process.wait(60) == 3  # as dnsmasq
    responder.stop()
    assert "log-facility: cannot open" in responder.log[-1]


def test_full_disk(node: Namespace) -> None:
    with Responder(node, "--log-facility=/dev/full", *OPTIONS, ready=False) as responder:
        wait_for(lambda: responder.has_logged("cannot write log to /dev/full: No space left on device"), "the report")
        for _ in range(20):
            assert texts(ask(node, "127.0.0.1", "ready.example")) == ["192.0.2.1"]
        wait_for(lambda: responder.metric("log_lines_lost_total") >= 40, "the lost lines")
        assert len(responder.log) == 1


def test_unread_stderr_delays_no_query(node: Namespace) -> None:
    """A container runtime that does not read the pipe."""
    command = [*COMMAND, "dns", "--no-resolv", "--no-hosts", "--log-facility=-", *OPTIONS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=node.enter_in_child)
    try:
        wait_for(lambda: b":53 " in node.run(["ss", "-Hlnu"]).encode(), "it to listen")
        wait_for(lambda: _answers(node), "it to respond")
        with connected(node, "127.0.0.1") as client:
            for number in range(4000):  # a pipe takes 64 KB, about a thousand lines
                client.send(bare_query("ready.example", number))
                assert client.recv(512)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0  # nor the end
    finally:
        process.kill()
        process.communicate()


def _answers(node: Namespace) -> bool:
    with contextlib.suppress(OSError):
        return bool(ask(node, "127.0.0.1", "ready.example", seconds=0.5))
    return False


# ---- syslog ----


@contextlib.contextmanager
def dev_log(folder: Path) -> Iterator[tuple[socket.socket, tuple[str, ...]]]:
    """A syslog daemon's socket, and the wrapper of a program that finds it as /dev/log."""
    path = folder / "log"
    script = (
        "mount -t tmpfs none /mnt && for each in null full urandom random; do cp -a /dev/$each /mnt/ || exit 9; done; "
        f'touch /mnt/log && mount --bind {path} /mnt/log && mount --move /mnt /dev && exec "$@"'
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(path))
        path.chmod(0o666)
        daemon.settimeout(20)
        yield daemon, ("unshare", "--mount", "sh", "-c", script, "sh")


def received(daemon: socket.socket, text: str) -> str:
    """Wait for the message with this text."""
    while True:
        line = daemon.recv(4096).decode().rstrip("\0\n")
        if text in line:
            return line


def test_syslog_beside_dnsmasq(node: Namespace, folder: Path) -> None:
    needs("dnsmasq", "dnsmasq-base")
    with dev_log(folder) as (daemon, wrapper):
        options = ("--log-facility=local3", "--user=nobody", *OPTIONS)
        with Responder(node, *options, ready=False, wrapper=wrapper) as responder:
            ours = received(daemon, "ready")
            ask(node, "127.0.0.1", "ready.example")
            asked = received(daemon, "query[A] ready.example from 127.0.0.1")
            assert responder.log == []
        process = node.popen([*wrapper, "dnsmasq", "-C/dev/null", "--no-resolv", "--no-hosts", "--pid-file", *options])
        try:
            theirs = received(daemon, "started, version")
        finally:
            process.kill()
            process.communicate()
    for line in (ours, asked, theirs):  # 158: local3.info
        assert re.match(r"<158>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d (udpwatch|dnsmasq)\[\d+\]: ", line), line


def test_without_syslog_lines_are_lost(node: Namespace, folder: Path) -> None:
    with dev_log(folder) as (daemon, wrapper):
        daemon.close()  # as in a container: nothing receives
        options = ("--log-facility=daemon", *OPTIONS)
        with Responder(node, *options, ready=False, wrapper=wrapper) as responder:
            wait_for(lambda: responder.has_logged("cannot write log to daemon: /dev/log: "), "the report")
            assert texts(ask(node, "127.0.0.1", "ready.example")) == ["192.0.2.1"]
            assert responder.metric("log_lines_lost_total") > 0


# ---- process ----


def test_stays_in_the_foreground_and_says_so(node: Namespace, folder: Path) -> None:
    pid = folder / "dns.pid"
    with Responder(node, f"--pid-file={pid}") as responder:
        assert int(pid.read_text()) == responder.process.pid
        assert len([line for line in responder.log if "staying in the foreground" in line]) == 1
    for option in ("--keep-in-foreground", "--no-daemon"):
        with Responder(node, option) as responder:
            assert not responder.has_logged("foreground")


def test_debug_lines(node: Namespace) -> None:
    with Responder(node, "--log-debug", "--interface=lo") as responder:
        assert responder.has_logged("dns: serving 0.0.0.0 port 53")
    with Responder(node, "--interface=lo") as responder:
        assert not responder.has_logged("dns: serving")


def test_user_without_root_binds_to_an_interface() -> None:
    """--server=..@INTERFACE needs no capability since Linux 5.7; before that it keeps CAP_NET_RAW."""
    with Lab() as built:
        node, outside = built.pair("node", ["10.1.0.1"], "outside", ["10.1.0.2"])
        options = ("--server=10.1.0.2@eth0", "--user=nobody", "--group=daemon")
        with FakeServer(outside, "10.1.0.2"), Responder(node, *options) as responder:
            assert texts(ask(node, "127.0.0.1", "www.example")) == ["192.0.2.80"]
            status = Path(f"/proc/{responder.process.pid}/status").read_text()
            capabilities = int(re.search(r"CapEff:\s+(\w+)", status)[1], 16)  # type: ignore[index]
            kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
            assert capabilities == (1 << 10 if kernel >= (5, 7) else 1 << 10 | 1 << 13)
            for kind in ("CapPrm", "CapBnd"):
                assert int(re.search(rf"{kind}:\s+(\w+)", status)[1], 16) == capabilities  # type: ignore[index]
            assert re.search(rf"Uid:\s+{NOBODY.pw_uid}\s+{NOBODY.pw_uid}\s+{NOBODY.pw_uid}", status)
            assert re.search(r"Gid:\s+1\s+1\s+1\s", status)
