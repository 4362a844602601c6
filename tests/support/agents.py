"""Real `udpwatch` commands beside the test: an agent, or one that runs to its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from waiting import PATIENCE_SECONDS, wait_for

from udpwatch.agent.client.connection import Client
from udpwatch.agent.testing.child import COMMAND, Child


class Command(Child):
    """A `udpwatch` command that runs beside the test and serves HTTP pages. A context manager."""

    def __init__(self, *arguments: str, ready: bool = True, **options: Any) -> None:
        """Start it, and wait until it is ready unless ``ready`` is false."""
        super().__init__(*arguments, **options)
        if ready:
            try:
                self.wait_until_ready(seconds=PATIENCE_SECONDS)
            except BaseException:
                self.stop(signal.SIGKILL)
                raise

    @property
    def url(self) -> str:
        """The address of its pages."""
        raise NotImplementedError

    def get(self, path: str) -> tuple[int, str]:
        """Send an HTTP request; returns status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def samples(self, name: str) -> list[Sample]:
        """Return the series of a metric."""
        status, text = self.get("/metrics")
        assert status == 200
        families = text_string_to_metric_families(text)
        return [sample for family in families for sample in family.samples if sample.name == name]

    def resident_kib(self) -> int:
        """Return the size of its resident memory."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found
        return int(found.group(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)


class Agent(Command):
    """`udpwatch run` with everything in a folder of its own; ready when the constructor returns."""

    def __init__(self, folder: Path, *flags: str, **options: Any) -> None:
        self.socket = folder / "udpwatch.sock"
        self.events_file = folder / "events.jsonl"
        places = ("--metrics-listen=127.0.0.1:0", f"--socket={self.socket}", f"--events={self.events_file}")
        super().__init__("run", *places, *flags, **options)

    @property
    def url(self) -> str:
        found = wait_for(lambda: re.search(r"metrics on (\S+)/metrics", "\n".join(self.log)), "the metrics address")
        url: str = found.group(1)
        return url

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's series that have these labels."""
        return sum(sample.value for sample in self.samples(name) if labels.items() <= sample.labels.items())

    def wrong(self, port: int) -> int:
        """Return the count of wrong replies from a port."""
        return int(self.metric("udpwatch_reply_source_mismatch_total", port=str(port)))

    def counted(self, port: int, at_least: int) -> int:
        """Wait until so many wrong replies from a port are counted; returns the count, which must not be higher."""
        count: int = wait_for(lambda: (now := self.wrong(port)) >= at_least and now, f"{at_least} wrong replies")
        return count

    def snapshot(self) -> dict[str, Any]:
        with Client(self.socket) as client:
            return asdict(client.snapshot())


def temporary() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder with a short path: a Unix socket's path has 107 bytes at most."""
    return tempfile.TemporaryDirectory(prefix="udpwatch-test-")


def before_all(folder: Path) -> dict[str, str]:
    """Return an environment in which modules in ``folder`` come before all others."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def as_nobody() -> Sequence[str]:
    """Return a ``wrapper`` for run_cli that runs as user nobody; skip the test if nobody cannot read this checkout."""
    wrapper = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if subprocess.run([*wrapper, "test", "-r", __file__], check=False).returncode:
        pytest.skip(f"nobody (65534) may not read {__file__}: put the checkout where other users can")
    return wrapper


def run_cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a `udpwatch` command to its end."""
    wrapper = options.pop("wrapper", ())
    return subprocess.run(
        [*wrapper, *COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **options.pop("env", {})},
        **options,
    )
