"""A real terminal that runs one command, and a real Prometheus for it to read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest
from agents import COMMAND
from waiting import wait_for

from udpwatch.agent.testing.lab import die_with_parent

ENVIRONMENT = os.environ | {"LC_ALL": "C.UTF-8"}


class Terminal:
    """A real terminal of 80x24 that runs one command; its screen as text."""

    def __init__(self, folder: Path, *command: str, **environment: str) -> None:
        if not shutil.which("tmux"):
            pytest.skip("needs tmux: apt-get install tmux")
        self._server = str(folder / "tmux.sock")
        self._log = folder / "stderr"
        words = [f"{name}={value}" for name, value in environment.items()]
        # A shell as a user's: what it finds of its terminal afterwards is what a user would.
        script = (
            'before=$(stty -g); "$@"; status=$?; [ "$(stty -g)" = "$before" ] && echo "restored, status $status"; cat'
        )
        run = ["sh", "-c", script, "sh", "env", *words, *command]
        # Not a daemon: when these tests are killed it is, too, and what runs in it is hung up on.
        self._process = subprocess.Popen(
            ["tmux", "-S", self._server, "-f", "/dev/null", "-D"], env=ENVIRONMENT, preexec_fn=die_with_parent
        )
        wait_for(Path(self._server).exists, "tmux to listen")
        self._tmux("new-session", "-d", "-x", "80", "-y", "24", *run)

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-S", self._server, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names."""
        self._tmux("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        """Resize the window."""
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    @property
    def lines(self) -> list[str]:
        """The lines of the screen."""
        return self._tmux("capture-pane", "-p", "-N").split("\n")[:-1]

    @property
    def text(self) -> str:
        """The screen as one text."""
        return "\n".join(self.lines)

    def ask(self, what: str) -> str:
        """One of tmux's variables of the pane."""
        return self._tmux("display-message", "-p", f"#{{{what}}}").strip()

    @property
    def pid(self) -> int:
        """The command's."""
        shell = self.ask("pane_pid")
        children = Path(f"/proc/{shell}/task/{shell}/children")
        return int(wait_for(lambda: children.read_text().split(), "the command to start")[0])

    def shows(self, *words: str) -> str:
        """Wait until all words are on the screen; returns its text."""

        def there() -> str:
            text = self.text
            return text if all(word in text for word in words) else ""

        try:
            shown: str = wait_for(there, f"{words} on the screen", 60)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows:\n{self.text}") from None
        return shown

    def hides(self, word: str) -> None:
        """Wait until a word is gone."""
        wait_for(lambda: word not in self.text, f"{word!r} to leave the screen", 60)

    def ended(self) -> int:
        """Wait for the command's end; returns its exit status. The terminal must be as it was before."""
        status = re.search(r"restored, status (\d+)", self.shows("restored, status "))
        assert status
        modes = {name: self.ask(name) for name in ("alternate_on", "cursor_flag", "mouse_any_flag", "keypad_flag")}
        assert modes == {"alternate_on": "0", "cursor_flag": "1", "mouse_any_flag": "0", "keypad_flag": "0"}
        return int(status.group(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def top(*words: str) -> list[str]:
    return [*COMMAND, "top", *words]


def search(terminal: Terminal, words: str) -> None:
    """Filter by these words."""
    terminal.press("/")
    terminal.shows("words that a row must contain")
    terminal.press(*words)
    terminal.shows(f" {words} ")
    terminal.press("Enter")


def widened(terminal: Terminal, width: int) -> None:
    """Resize the terminal and wait until it is drawn: keys before this have then been handled."""
    terminal.resize(width, 24)
    wait_for(lambda: max(map(len, terminal.text.splitlines())) == width, "the new width")
    terminal.shows("c clear" if " ⇥ servers" in terminal.text else "? help")


def row_of(text: str, port: int) -> list[str]:
    """Return the words of the row of a port."""
    return next((line.split() for line in text.splitlines() if re.search(rf" {port} +1", line)), [])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus:
    """A real Prometheus on loopback that scrapes each second."""

    def __init__(self, folder: Path, targets: Sequence[str]) -> None:
        if not shutil.which("prometheus"):
            pytest.skip("needs prometheus: apt-get install prometheus")
        config = folder / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            f"scrape_configs: [{{job_name: udpwatch, static_configs: [{{targets: {json.dumps(list(targets))}}}]}}]\n"
        )
        listen = f"127.0.0.1:{free_port()}"
        self.url = f"http://{listen}"
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
             f"--web.listen-address={listen}"],
            stdout=self._log, stderr=self._log, preexec_fn=die_with_parent,
        )  # fmt: skip

    def ready(self) -> None:
        """Wait until it answers."""

        def is_ready() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
            return False

        wait_for(is_ready, "Prometheus", 60)

    def value(self, query: str) -> float | None:
        """Return the value of a query's only series; None: it has none."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            found = json.load(answer)["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
