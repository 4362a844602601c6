"""Commands as child processes: ready, ended too early, stopped."""

from __future__ import annotations

import signal

import pytest
from repository import GOLDEN

from udpwatch.agent.errors import CannotRun, UdpwatchError
from udpwatch.agent.testing.child import Child

REPLAY = ("run", f"--replay={GOLDEN / 'replay.jsonl'}", "--metrics-listen=off", "--socket=off")


def test_ready_child_stops_with_status_0() -> None:
    child = Child(*REPLAY)
    child.wait_until_ready()
    assert child.is_ready
    assert "udpwatch: ready" in child.log
    assert child.stop() == 0


def test_child_that_ends_early_raises_its_last_message() -> None:
    child = Child("run", "--replay=/none/none.jsonl", name="replay")
    with pytest.raises(UdpwatchError, match=r"^replay: .*none\.jsonl"):
        child.wait_until_ready()
    assert child.stop() == 2


def test_child_that_this_machine_cannot_run_raises_cannot_run() -> None:
    wrapper = ("sh", "-c", "echo 'udpwatch: cannot do it' >&2; exit 77")
    child = Child("run", wrapper=wrapper, keep_lines=1)
    with pytest.raises(CannotRun, match=r"^cannot do it$"):
        child.wait_until_ready()
    child.stop()


def test_child_that_is_not_ready_in_time_raises() -> None:
    child = Child("run", wrapper=("sh", "-c", "exec sleep 600"))
    with pytest.raises(UdpwatchError, match=r"^not ready after 0 s: nothing was logged$"):
        child.wait_until_ready(seconds=0.1)
    assert child.stop() == -signal.SIGTERM


def test_child_that_ignores_the_signal_is_killed() -> None:
    child = Child("run", wrapper=("sh", "-c", "trap '' TERM; echo trapped >&2; exec sleep 600"))
    child.wait_until_ready(lambda: child.last_message == "trapped")
    assert child.stop(seconds=0.1) == -signal.SIGKILL


def test_only_the_newest_lines_of_the_log_are_kept() -> None:
    child = Child("run", wrapper=("sh", "-c", "seq 1000 >&2; exec sleep 600"), keep_lines=3)
    child.wait_until_ready(lambda: child.last_message == "1000")
    assert child.log == ["998", "999", "1000"]
    child.stop(signal.SIGKILL)
