"""`udpwatch top` in a real terminal (tmux), with real agents, and with a real Prometheus that scrapes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest
from agents import COMMAND, Agent, as_nobody, run_cli
from repository import GOLDEN
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.testing.lab import ContainerHost, die_with_parent

EVENTS = GOLDEN / "events.jsonl"
MANY = 5_000
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


@pytest.fixture
def port() -> int:
    """Return a port that no other run of the tests on this machine uses: an agent sees all of them."""
    return 40_000 + (os.getpid() * 7 + next(_ports)) % 20_000


_ports = count()


def only(terminal: Terminal, port: int) -> None:
    """Show only the rows of this port, since the whole machine is watched."""
    terminal.shows("q quit", "s ago")
    search(terminal, str(port))
    terminal.shows("No row contains these words")


def search(terminal: Terminal, words: str) -> None:
    """Filter by these words."""
    terminal.press("/")
    terminal.shows("words that a row must contain")
    terminal.press(*words)
    terminal.shows(f" {words} ")
    terminal.press("Enter")


def row_of(text: str, port: int) -> list[str]:
    """Return the words of the row of a port."""
    return next((line.split() for line in text.splitlines() if re.search(rf" {port} 1", line)), [])


def test_finding_is_shown_and_every_key_works(agent: Agent, folder: Path, host: ContainerHost, port: int) -> None:
    with Terminal(folder, *top("--connect", str(agent.socket))) as terminal:
        only(terminal, port)
        wrong_replies(host, port, 23)
        row = row_of(terminal.shows(f" {port} {host.ETH0}"), port)
        assert row[2:6] == [str(port), host.ETH0, host.DOCKER0, "new"]
        wait_for(lambda: row_of(terminal.text, port)[-2] == "23", "the total")
        assert len(terminal.lines) == 24

        terminal.press("Enter")
        terminal.shows(" fix ")
        terminal.resize(200, 50)
        terminal.shows("kernel-chosen", "pod or container", f"conntrack {host.DOCKER0}:{port} > {host.CONTAINER}")
        text = terminal.text
        assert len(text.splitlines()) == 50
        assert max(map(len, text.splitlines())) == 200
        terminal.press("Enter")
        terminal.hides(" fix ")
        terminal.resize(80, 24)
        terminal.shows("total last")

        terminal.press("c")
        terminal.shows("totals since", "No row contains these words")
        wrong_replies(host, port, 2)
        wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "2", "what came since the clear")
        terminal.press("/")
        terminal.press(*"nothing")
        terminal.shows("nothing", "No row contains these words")
        terminal.press(*["BSpace"] * 7, "Enter")
        wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "2", "the row again")
        terminal.press("p")
        terminal.shows("paused at")
        wrong_replies(host, port, 1)
        agent.counted(port, 26)
        assert row_of(terminal.text, port)[-2] == "2"
        terminal.press("p")
        wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "3", "what came since the pause")
        terminal.press("?")
        terminal.shows("sort by the next column")
        terminal.press("Escape")
        terminal.hides("sort by the next column")
        terminal.press("s")
        terminal.shows("total▼")
        terminal.press("q")
        assert terminal.ended() == 0


def test_restarted_agent_is_reconnected(folder: Path, host: ContainerHost, port: int) -> None:
    agent = Agent(folder)
    try:
        with Terminal(folder, *top("--connect", str(agent.socket))) as terminal:
            only(terminal, port)
            wrong_replies(host, port, 5)
            terminal.shows(f" {port} {host.ETH0}")
            agent.stop()
            terminal.shows("not connected: retrying", f" {port} {host.ETH0}")
            agent = Agent(folder)
            terminal.shows("No row contains these words")
            wrong_replies(host, port, 3)
            wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "3", "the new agent's count")
            agent.stop(signal.SIGKILL)
            terminal.shows("not connected: retrying")
            terminal.press("s")
            terminal.shows("total▼")
            terminal.press("q")
            assert terminal.ended() == 0
    finally:
        agent.stop(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_restores_the_terminal(folder: Path, number: signal.Signals) -> None:
    with Terminal(folder, *top("--replay", str(EVENTS))) as terminal:
        terminal.shows("q quit", "plain-server")
        (child,) = Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split()
        os.kill(terminal.pid, number)
        assert terminal.ended() == 0
        wait_for(lambda: not Path(f"/proc/{child}").exists(), "its agent to end")


@pytest.mark.parametrize("milliseconds", [300, 500, 700, 900, 1100, 1300])
def test_signal_at_any_time_of_the_start_restores_the_terminal(folder: Path, milliseconds: int) -> None:
    with Terminal(folder, *top("--replay", str(EVENTS))) as terminal:
        time.sleep(milliseconds / 1000)  # no condition marks these moments
        os.kill(terminal.pid, signal.SIGTERM)
        terminal.ended()


def test_exception_restores_the_terminal(folder: Path) -> None:
    code = (
        "from udpwatch.agent.client.top import screen; import sys; from udpwatch.agent.cli import main\n"
        "screen.TopApp.action_sort = lambda self: 1 / 0\n"
        f"sys.exit(main(['top', '--replay', {str(EVENTS)!r}]))"
    )
    with Terminal(folder, sys.executable, "-P", "-c", code) as terminal:
        terminal.shows("q quit", "plain-server")
        terminal.press("s")
        assert terminal.ended() == 1
        assert "ZeroDivisionError" in terminal.text


def test_private_agent_is_started_when_none_runs(folder: Path, host: ContainerHost, port: int) -> None:
    if Path("/run/udpwatch/udpwatch.sock").exists():
        pytest.skip("an agent runs here")
    with Terminal(folder, *top()) as terminal:
        only(terminal, port)
        wrong_replies(host, port, 4)
        terminal.shows(f" {port} {host.ETH0}")
        (child,) = Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split()
        os.kill(terminal.pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{child}").exists(), "its agent to end")
    assert not list(Path("/tmp").glob("udpwatch-top-*"))


def test_without_root_and_agent_it_is_an_error() -> None:
    if Path("/run/udpwatch/udpwatch.sock").exists():
        pytest.skip("an agent runs here")
    done = run_cli("top", "--once", wrapper=as_nobody())
    assert done.returncode == 77
    assert "start `udpwatch run` as root" in done.stderr


def test_socket_without_permission_is_an_error(agent: Agent, folder: Path) -> None:
    folder.chmod(0o755)
    done = run_cli("top", "--once", "--connect", str(agent.socket), wrapper=as_nobody())
    assert done.returncode == 77
    assert "permission denied" in done.stderr


def test_once_prints_json_for_jq(agent: Agent, host: ContainerHost, port: int) -> None:
    if not shutil.which("jq"):
        pytest.skip("needs jq: apt-get install jq")
    wrong_replies(host, port, 7)
    agent.counted(port, 7)
    done = run_cli("top", "--once", "--json", "--connect", str(agent.socket))
    assert (done.returncode, done.stderr) == (0, "")
    query = f'.findings[] | select(.port == {port}) | "\\(.expected) \\(.actual) \\(.verdict) \\(.total)"'
    found = subprocess.run(["jq", "-r", query], input=done.stdout, capture_output=True, text=True, check=True).stdout
    assert found == f"{host.ETH0} {host.DOCKER0} new 7\n"
    table = run_cli("top", "--once", "--connect", str(agent.socket))
    assert row_of(table.stdout, port)[-2] == "7"


def test_once_works_in_a_locale_without_utf_8(agent: Agent, host: ContainerHost, port: int) -> None:
    wrong_replies(host, port, 7)
    agent.counted(port, 7)
    done = run_cli("top", "--once", "--connect", str(agent.socket), env={"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert row_of(done.stdout, port)[-2] == "7"


# ---- many at once ----


def burst(path: Path, seconds: int) -> None:
    """A recording in which MANY servers send wrong replies every second."""
    told = json.loads(EVENTS.read_text().splitlines()[0])
    begin = datetime(2027, 1, 15, 8, tzinfo=UTC)
    with path.open("w") as file:
        for second in range(seconds):
            told["time"] = (begin + timedelta(seconds=second)).isoformat(timespec="milliseconds")
            for number in range(MANY):
                told |= {"port": 1024 + number, "process": f"srv-{number % 97}", "pod": f"pod-{number}"}
                file.write(json.dumps(told | {"count": (second + 1) * (1 + number % 9)}) + "\n")


def test_keys_work_during_a_burst(folder: Path) -> None:
    burst(folder / "burst.jsonl", 20)
    with Terminal(folder, *top("--replay", str(folder / "burst.jsonl"))) as terminal:
        terminal.shows(f"of {MANY}")
        took = []
        for order in ("total▼", "last▼", "process▲", "pod▲", "port▲", "/s▼"):
            begun = time.monotonic()
            terminal.press("s")
            terminal.shows(order)
            took.append(time.monotonic() - begun)
        print(f"a key is answered within {min(took):.2f} to {max(took):.2f} s while {MANY} rows change each second")
        terminal.press("G")
        terminal.shows(f"{MANY - 18}-{MANY} of {MANY}")
        terminal.press("/")
        terminal.press(*"pod-4321")
        terminal.shows("1-1 of 1", "5345 ")
        terminal.press("Escape")
        terminal.resize(200, 50)
        terminal.shows("pod or container", f"of {MANY}")
        terminal.press("q")
        assert terminal.ended() == 0


# ---- the cluster ----


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def cluster(url: str) -> dict[str, Any]:
    done = run_cli("top", "--once", "--json", "--prometheus", url)
    told: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"findings": [], "nodes": []}
    return told


def test_cluster_of_two_nodes_is_shown(agent: Agent, folder: Path, host: ContainerHost, port: int) -> None:
    """One is a real agent, the other replays a recording."""
    second = folder / "second"
    second.mkdir()
    with Agent(second, f"--replay={EVENTS}") as replay:
        nodes = [each.url.removeprefix("http://") for each in (agent, replay)]
        with Prometheus(folder, nodes) as prometheus:
            wrong_replies(host, port, 5)
            agent.counted(port, 5)

            def totals() -> dict[tuple[str, int], int]:
                found = cluster(prometheus.url)["findings"]
                return {(each["node"], each["port"]): each["total"] for each in found}

            wait_for(lambda: totals().get((nodes[0], port)) == 5, "the real node's finding")
            wait_for(lambda: (nodes[1], 56789) in totals(), "the replaying node's finding")
            with Terminal(folder, *top("--prometheus", prometheus.url)) as terminal:
                terminal.shows("2 nodes", prometheus.url, "node ", nodes[0][:8])
                search(terminal, str(port))
                wrong_replies(host, port, 20)
                wait_for(lambda: (row_of(terminal.text, port) or ["", ""])[-2] == "25", "the total", 60)
                terminal.resize(200, 50)
                assert row_of(terminal.shows(nodes[0], "kernel-chosen"), port)[0] == nodes[0]
                terminal.press("Escape")
                terminal.shows(nodes[1])
                search(terminal, "dns-7c9")
                terminal.shows(nodes[1], "shop/dns-7c9")
                terminal.press("Enter")
                terminal.shows(" fix ", "Prometheus stores no events")
                agent.stop()
                prometheus.__exit__()
                terminal.shows("not connected: retrying")
                terminal.press("q")
                assert terminal.ended() == 0
    gone = run_cli("top", "--once", "--prometheus", prometheus.url)
    assert gone.returncode == 1
    assert "Connection refused" in gone.stderr
