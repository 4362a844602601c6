"""The log of `udpwatch dns`: nothing waits for its target, and lost lines are counted."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

from udpwatch.agent.daemon import log_output
from udpwatch.agent.daemon.log_output import MAX_LINE, MAX_QUEUED, LogOutput

log = logging.getLogger("udpwatch.test")


@pytest.fixture(autouse=True)
def every_line() -> Iterator[None]:
    log.setLevel(logging.DEBUG)
    yield
    log.setLevel(logging.NOTSET)


def started(target: str) -> LogOutput:
    output = LogOutput(target)
    output.open(None)
    output.start()
    return output


def test_file_has_lines_of_dnsmasq(tmp_path: Path) -> None:
    file = tmp_path / "dns.log"
    file.write_text("former\n")
    output = LogOutput(str(file))
    with output.installed():
        log.info("before it is open")
        output.open(None)
        output.start()
        log.warning("a %s", "line \udc80")
    first, second, third = file.read_text().splitlines()
    assert first == "former"
    assert re.fullmatch(rf"[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d udpwatch\[{os.getpid()}\]: before it is open", second)
    assert third.endswith(": a line \\udc80")
    assert output.lost == [0]


def test_lines_before_a_failed_start_go_to_stderr(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = LogOutput(str(tmp_path / "missing" / "dns.log"))
    with pytest.raises(FileNotFoundError), output.installed():
        log.info("one")
        output.open(None)
    assert capfd.readouterr().err == "udpwatch: one\n"


def test_reopened_after_rotation(tmp_path: Path) -> None:
    file, former = tmp_path / "dns.log", tmp_path / "dns.log.1"
    with (output := started(str(file))).installed():
        log.info("one")
        wait_for(file.read_text, "the line")
        file.rename(former)
        log.info("two")
        wait_for(lambda: "two" in former.read_text(), "the line in the former file")
        output.reopen()
        wait_for(file.exists, "the new file")
        log.info("three")
    assert [line.rpartition(" ")[2] for line in former.read_text().splitlines()] == ["one", "two"]
    assert file.read_text().endswith("three\n")


def test_former_file_is_kept_if_the_new_one_cannot_be_opened(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, former = tmp_path / "dns.log", tmp_path / "dns.log.1"
    with (output := started(str(file))).installed():
        log.info("one")
        wait_for(file.read_text, "the line")
        file.rename(former)
        file.mkdir()
        output.reopen()
        log.info("two")
    assert former.read_text().endswith("two\n")
    assert capfd.readouterr().err == (
        f"udpwatch: cannot open log {file} again: Is a directory; still writing to the former file\n"
    )
    assert output.lost == [0]


def test_removed_file_is_created_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dns.log"
    with (output := started(str(file))).installed():
        file.unlink()
        log.info("one")
        wait_for(file.exists, "the file")
        file.unlink()
        file.mkdir()
        log.info("two")
        wait_for(lambda: output.lost == [1], "the lost line")
        file.rmdir()
        log.info("three")
    assert [line.partition("]: ")[2] for line in file.read_text().splitlines()] == [
        "three",
        "dns: 1 log lines lost: the file was removed and cannot be created again: Is a directory",
    ]
    assert "the file was removed and cannot be created again: Is a directory; 1 lines lost so far" in (
        capfd.readouterr().err
    )


def test_full_disk_costs_lines_only(capfd: pytest.CaptureFixture[str]) -> None:
    with (output := started("/dev/full")).installed():
        for number in range(1000):
            log.info("line %d", number)
        wait_for(lambda: output.lost == [1000], "all to be lost")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(
        r"udpwatch: cannot write log to /dev/full: No space left on device; \d+ lines lost so far", lines[0]
    )


def test_nothing_waits_for_a_reader(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with (output := started(str(fifo))).installed():
        for number in range(3 * MAX_QUEUED):
            log.info("line %d", number)
        assert output.lost[0] >= MAX_QUEUED
        os.set_blocking(reader, True)
        data = b""
        while b"lines lost: too many lines" not in data:
            data += os.read(reader, 1 << 16)
    os.close(reader)
    assert data.count(b"]: line ") + output.lost[0] >= MAX_QUEUED


def test_long_lines_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "dns.log"
    with started(str(file)).installed():
        log.info("x" * 10 * MAX_LINE)
        try:
            raise ValueError("y" * 2 * MAX_LINE)
        except ValueError:
            log.exception("z")
    text = file.read_text()
    assert text.count("x") < MAX_LINE + 100 and text.count("y") > 2 * MAX_LINE


@pytest.mark.parametrize(("facility", "number"), [("daemon", 3), ("local7", 23), ("kern", 0)])
def test_syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facility: str, number: int) -> None:
    path = tmp_path / "log"
    monkeypatch.setattr(log_output, "DEV_LOG", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon, started(facility).installed():
        daemon.bind(str(path))
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
            log.log(level, "text")
        found = [daemon.recv(4096).decode() for _ in range(5)]
    for line, severity in zip(found, (7, 6, 4, 3, 2), strict=True):
        pattern = rf"<{number * 8 + severity}>[A-Z][a-z]{{2}} [ \d]\d [\d:]{{8}} udpwatch\[{os.getpid()}\]: text"
        assert re.fullmatch(pattern, line)


def test_syslog_that_is_missing_stuck_or_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    monkeypatch.setattr(log_output, "DEV_LOG", str(path))
    monkeypatch.setattr(log_output, "SYSLOG_SECONDS", 0.1)
    with (output := started("daemon")).installed():
        log.info("one")
        wait_for(lambda: output.lost == [1], "the lost line")
        wait_for(lambda: "No such file or directory; 1 lines lost so far" in capfd.readouterr().err, "the report")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
            first.bind(str(path))
            log.info("two")
            assert first.recv(4096).endswith(b"two")
            assert first.recv(4096).endswith(f"dns: 1 log lines lost: {path}: No such file or directory".encode())
        path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
            second.bind(str(path))
            log.info("three")
            assert second.recv(4096).endswith(b"three")
            for number in range(2000):  # it reads no more
                log.info("line %d", number)
            wait_for(lambda: output.lost[0] > 1, "lost lines")


def test_any_thread_may_log(tmp_path: Path) -> None:
    file = tmp_path / "dns.log"
    with (output := started(str(file))).installed():
        threads = [threading.Thread(target=lambda: [log.info("x") for _ in range(500)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(file.read_text().splitlines()) + output.lost[0] == 4000
