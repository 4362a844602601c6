"""A real Prometheus scrapes real agents; every panel, variable and alert rule queries it, as Grafana would."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import boards
import pytest
import yaml
from agents import Agent, run_cli, temporary
from boards import Query, filled_in
from dns_server import Asked, FakeServer, ask, bare_query, right, write
from repository import GOLDEN
from scene_agent import InNamespace
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.kernel import bpf
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost

LISTEN = "127.0.0.1:9090"
PORT, SHORT_PORT, HEALED_PORT = 19_053, 19_054, 19_055
SERVER, SHORT_SERVER, HEALED_SERVER = "wrong-server", "short.server+1", "healed-server"
AFAR, DEAD = "192.0.2.7", "172.16.13.99"
RECORDING = GOLDEN / "replay.jsonl"
ENABLE_STATS = 32  # bpf(2); the programs' run times are counted while the descriptor is open

RANGE_S, STEP_S, RATE_S = 600, 1, 5

#: What rightly shows nothing here, and why. Everything else must have data.
EMPTY = {
    "udpwatch-agent/Attached again/A": "nobody detaches programs (test_agent.py does)",
    "udpwatch-agent/Skipped runs/A": "a CPU has to be in a probe while it enters one",
    "udpwatch-agent/Node faults/A": "the node has none (test_overload.py does)",
    "udpwatch-agent/Memory limit used/A": "the agent has no memory limit",
    "udpwatch-agent/Dropped/A": "no table is filled",
    "udpwatch-agent/Dropped/B": "no table is filled",
    "udpwatch-agent/Dropped/C": "a race of two packets",
    "alert/UdpwatchServerDropsRequests": "no receive buffer is full",
    "alert/UdpwatchTooManyServers": "no table of findings is full",
    "alert/UdpwatchProbeDetached": "the agents see",
    "alert/UdpwatchProbeLost": "nobody takes probes away",
    "alert/UdpwatchSelfTestFailed": "the agents see",
    "alert/UdpwatchSeesNoReplies": "the agents see",
    "alert/UdpwatchAgentStarved": "the agents have enough CPU",
    "alert/UdpwatchMemoryShort": "the agent has no memory limit",
    "alert/UdpwatchBeyondLimits": "there are few namespaces and sockets",
    "alert/UdpwatchClockChanged": "nobody sets the clock",
    "alert/UdpwatchDnsNoUpstream": "one of the upstream servers answers",
    "alert/UdpwatchConntrackFilling": "no table is filled",
    "alert/UdpwatchConntrackFull": "no table is filled",
}


class Prometheus:
    """Prometheus on a node of the lab, scraping each second."""

    def __init__(self, scene: ContainerHost, folder: Path, scrapes: Sequence[dict[str, Any]], rules: Path) -> None:
        if not shutil.which("prometheus"):
            pytest.skip("needs prometheus: apt-get install prometheus")
        self.scene = scene
        self.agents: list[str] = []
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config = {"global": every, "scrape_configs": list(scrapes), "rule_files": [str(rules)]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = folder / "prometheus.log"
        command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={LISTEN}",
        ]
        self._process = scene.node.popen(["sh", "-c", f'exec "$@" >{self._log} 2>&1', "sh", *command])

    def get(self, path: str, **parameters: Any) -> Any:
        """Request its HTTP API; raises AssertionError with Prometheus' error."""
        url = f"http://{LISTEN}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        with self.scene.node.entered():
            try:
                with urllib.request.urlopen(url, timeout=30) as answer:
                    told = json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert not told.get("warnings"), told
        return told["data"]

    def ask(self, query: Query, **chosen: Sequence[str]) -> list[dict[str, Any]]:
        """Return the series of a query's result that have a number."""
        expression = filled_in(query.expression, chosen, RANGE_S, STEP_S, RATE_S)
        now = time.time()
        if query.instant:
            told = self.get("query", query=expression, time=now)
            found = [(each["metric"], [each["value"]]) for each in told["result"]]
        else:
            told = self.get("query_range", query=expression, start=now - 120, end=now, step=STEP_S)
            found = [(each["metric"], each["values"]) for each in told["result"]]
        return [
            {**labels, "value": [float(value) for _, value in values if value != "NaN"][-1]}
            for labels, values in found
            if any(value != "NaN" for _, value in values)
        ]

    @property
    def is_up(self) -> bool:
        """Whether it answers yet."""
        assert self._process.poll() is None, self._log.read_text()
        with self.scene.node.entered(), contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://{LISTEN}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Traffic:
    """Wrong replies, healed ones and DNS queries, until it is stopped."""

    def __init__(self, scene: ContainerHost) -> None:
        self._scene = scene
        self._stop = threading.Event()
        loops = self._wrong_replies, self._healed_replies, self._dns
        self._threads = [threading.Thread(target=each, daemon=True) for each in loops]
        self._servers = contextlib.ExitStack()
        for name, port in ((SERVER, PORT), (HEALED_SERVER, HEALED_PORT)):
            bound = self._servers.enter_context(scene.node.socket())
            bound.bind(("0.0.0.0", port))
            server = scene.node.spawn(name, lambda bound=bound: servers.plain(bound))
            self._servers.callback(server.stop)
        for thread in self._threads:
            thread.start()

    def _wrong_replies(self) -> None:
        with self._scene.container.socket() as client:
            client.settimeout(0.2)
            while not self._stop.wait(0.1):
                for _ in range(150):
                    client.sendto(b"x", (self._scene.ETH0, PORT))
                    with contextlib.suppress(OSError):
                        client.recv(100)

    def _healed_replies(self) -> None:
        """One client asks one address and gets each reply; the other asks two, so that its replies are not healed."""
        scene = self._scene
        with scene.container.socket() as client, scene.container.socket() as asks_two:
            while not self._stop.wait(0.1):
                client.sendto(b"x", (scene.ETH0, HEALED_PORT))
                for address in (scene.ETH0, scene.DOCKER0):
                    asks_two.sendto(b"x", (address, HEALED_PORT))

    def _dns(self) -> None:
        """Local names, others, and ones that the upstream server fails; garbage, and queries that are not served."""
        scene = self._scene
        with scene.outside.socket() as afar, scene.container.socket() as near:
            afar.bind((AFAR, 0))
            number = 0
            while not self._stop.wait(0.05):
                number += 1
                afar.sendto(bare_query("host.test"), (scene.ETH0, 53))
                near.sendto(b"garbage", (scene.ETH0, 53))
                for each in range(20):
                    near.sendto(bare_query(f"broken{number}.{each}.test"), (scene.ETH0, 53))
                for name, tcp in (("host.test", False), (f"x{number}.test", False), (f"broken{number}.test", True)):
                    for address in (scene.ETH0, scene.ETH0_6):
                        with contextlib.suppress(OSError):
                            ask(scene.container, address, name, tcp=tcp, seconds=0.5)

    def stop(self) -> None:
        """Stop all traffic and wait for its end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        self._servers.close()


def unhelpful(asked: Asked) -> bytes | list[bytes] | None:
    """A DNS server that first sends something else, and refuses names that begin with broken."""
    if asked.name.startswith("broken"):
        return asked.answer(rcode=2)
    forged = bytearray(right(asked))
    forged[0] ^= 0xFF
    return [bytes(forged), right(asked)]


@contextlib.contextmanager
def run_times_counted() -> Iterator[None]:
    """Have the kernel count the run time of BPF programs, as with the sysctl kernel.bpf_stats_enabled."""
    descriptor = bpf.bpf(ENABLE_STATS, ctypes.create_string_buffer(struct.pack("=I", 0), 4))
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def scene() -> Iterator[ContainerHost]:
    with ContainerHost() as lab:
        lab.outside.ip(f"addr add {AFAR}/32 dev lo")
        lab.node.ip(f"route add {AFAR} via {lab.OUTSIDE}")
        yield lab


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The alert rules with minutes replaced by two seconds."""
    told = yaml.safe_load(boards.ALERTS.read_text())
    for group in told["groups"]:
        for rule in group["rules"]:
            rule["for"] = "2s"
    path: Path = tmp_path_factory.mktemp("rules") / "alerts.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


@pytest.fixture(scope="module")
def prometheus(scene: ContainerHost, rules: Path) -> Iterator[Prometheus]:
    """Prometheus scrapes a node as a PodMonitor would, the same one without relabelling, one that replays a recording,
    and one that is down.
    """
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(temporary())) for _ in range(3)]
        hosts = write(folders[0] / "hosts", "10.0.0.1 host.test")
        lines = ["no-hosts", "no-resolv", f"addn-hosts={hosts}", f"server={scene.OUTSIDE}", f"server={DEAD}"]
        conf = write(folders[0] / "dns.conf", *lines)
        stack.enter_context(run_times_counted())
        stack.enter_context(FakeServer(scene.outside, scene.OUTSIDE, unhelpful))
        agent: Agent = stack.enter_context(
            InNamespace(
                *(scene, folders[0], f"--dns-conf={conf}", "--events=/dev/full", "--events-per-second=2"),
                f"--heal={HEALED_PORT}",
            )
        )
        replay: Agent = stack.enter_context(InNamespace(scene, folders[1], "--no-dns", f"--replay={RECORDING}"))
        addresses = [each.url.removeprefix("http://") for each in (agent, replay)]
        scrapes = [
            {
                "job_name": "monitoring/udpwatch",
                "honor_labels": True,
                "static_configs": [
                    {
                        "targets": [address],
                        "labels": {
                            "node": f"worker-{number}",
                            "cluster": "east",
                            "instance": f"10.0.0.{number}:9953",
                            "namespace": "monitoring",
                            "pod": f"udpwatch-{number}",
                            "container": "udpwatch",
                        },
                    }
                    for number, address in enumerate(addresses, start=1)
                ],
            },
            {"job_name": "udpwatch", "static_configs": [{"targets": [addresses[0], "127.0.0.1:1"]}]},
        ]
        running = stack.enter_context(Prometheus(scene, folders[2], scrapes, rules))
        running.agents = addresses
        wait_for(lambda: running.is_up, "Prometheus")
        known = Query("", f"count(count_over_time(udpwatch_build_info[1m]) > {RATE_S + 2})")
        wait_for(lambda: [each["value"] for each in running.ask(known)] == [3], "some scrapes of each agent")
        wrong_replies(scene, SHORT_PORT, name=SHORT_SERVER)
        traffic = Traffic(scene)
        stack.callback(traffic.stop)
        # its own hosts file is gone: an error at the next reading, which SIGHUP asks for
        hosts.unlink()
        agent.process.send_signal(signal.SIGHUP)
        yield running


def have_data(prometheus: Prometheus, queries: Sequence[Query], **chosen: Sequence[str]) -> None:
    """Wait until each query has a result."""
    left = [each for each in queries if each.where not in EMPTY]
    assert left

    def all_answered() -> bool:
        left[:] = [each for each in left if not prometheus.ask(each, **chosen)]
        return not left

    with contextlib.suppress(AssertionError):
        wait_for(all_answered, "data", 60)
    assert not left, "no data: " + "\n".join(f"{each.where}: {each.expression}" for each in left)


def row(prometheus: Prometheus, where: str, **labels: str) -> dict[str, Any]:
    """Return the one series of a result that has these labels."""
    (query,) = [each for each in boards.of_panels() if each.where == where]

    def found() -> list[dict[str, Any]]:
        return [each for each in prometheus.ask(query) if labels.items() <= each.items()]

    told: list[dict[str, Any]] = wait_for(found, f"{where} to show {labels}", 30)
    (one,) = told
    return one


def test_every_panel_has_data(prometheus: Prometheus) -> None:
    have_data(prometheus, list(boards.of_panels()))


def test_every_alert_expression_has_data(prometheus: Prometheus) -> None:
    have_data(prometheus, list(boards.of_alerts()))


def test_every_query_in_the_docs_is_valid(prometheus: Prometheus) -> None:
    for query in boards.of_documents():
        prometheus.ask(query)


def test_healthy_agent_fires_no_alert(prometheus: Prometheus) -> None:
    queries = [*boards.of_panels(), *boards.of_alerts()]
    quiet = [each for each in queries if each.where in EMPTY]
    assert len(quiet) == len(EMPTY)
    for query in quiet:
        alarms = prometheus.ask(query)
        assert not (alarms and query.where.startswith("alert/")), (query.where, alarms)


def test_every_panel_has_data_for_selected_values(prometheus: Prometheus) -> None:
    """One node and one server of it; then an agent without a node label, as a scrape without relabelling gives it."""
    panels = list(boards.of_panels())
    node = {"cluster": ["east"], "node": ["worker-1", "worker-9"], "instance": ["10.0.0.1:9953"]}
    healed = [each for each in panels if "udpwatch_heal" in each.expression]
    wrong = [each for each in panels if each not in healed]
    have_data(prometheus, wrong, **node, process=[SERVER], port=[str(PORT)], pod=[""], namespace=[""])
    have_data(prometheus, healed, **node, process=[HEALED_SERVER], port=[str(HEALED_PORT)], pod=[""], namespace=[""])
    recorded = ("udpwatch-fleet/Servers/A", "udpwatch-fleet/Namespaces/A", "udpwatch-server/Findings/C")
    of_pods = [each for each in panels if each.where in recorded]
    have_data(prometheus, of_pods, node=["worker-2"], namespace=["dns"], process=["unbound"], port=["53"])
    with_dots = [each for each in panels if each.where == "udpwatch-server/Findings/A"]
    have_data(prometheus, with_dots, process=[SHORT_SERVER, "none"], instance=["10.0.0.1:9953"])
    plain = [each for each in wrong if "up{" not in each.expression]
    have_data(prometheus, plain, node=[""], process=[SERVER])


def test_every_variable_has_values(prometheus: Prometheus) -> None:
    for where, label, selector in boards.of_variables():
        values = prometheus.get(f"label/{label}/values", **{"match[]": filled_in(selector, {}, 60, 1, 5)})
        assert values, where
        if label in ("namespace", "pod"):
            assert "monitoring" not in values and "udpwatch-1" not in values, "the culprit's, not the agent's"


def test_server_with_one_wrong_reply_is_shown(prometheus: Prometheus) -> None:
    """increase() alone would not show a counter that starts at one."""
    labels = {"process": SHORT_SERVER, "port": str(SHORT_PORT), "node": "worker-1"}
    assert row(prometheus, "udpwatch-fleet/Servers/A", **labels)["value"] == 1
    since = row(prometheus, "udpwatch-fleet/Servers/C", **labels)["value"]
    last = row(prometheus, "udpwatch-fleet/Servers/D", **labels)["value"]
    assert since == last
    assert 0 < time.time() - since / 1000 < RANGE_S
    (over_time,) = [each for each in boards.of_panels() if each.where == "udpwatch-server/By node/A"]
    assert prometheus.ask(over_time, process=[SHORT_SERVER], node=["worker-1"])
    bare = Query("", f'increase(udpwatch_reply_source_mismatch_total{{port="{SHORT_PORT}"}}[{RANGE_S}s]) > 0')
    assert not prometheus.ask(bare), "then this test shows nothing"


def test_alerts_fire_with_their_labels(prometheus: Prometheus) -> None:
    expected = {rule["alert"] for rule in boards.rules()} - {where.removeprefix("alert/") for where in EMPTY}

    def alerts(state: str) -> list[dict[str, Any]]:
        return [each for each in prometheus.get("alerts")["alerts"] if each["state"] == state]

    def firing() -> set[str]:
        return {each["labels"]["alertname"] for each in alerts("firing")}

    wait_for(lambda: expected <= firing(), "all alerts", 30)
    assert firing() == expected
    (wrong,) = [
        each
        for each in alerts("firing")
        if (each["labels"]["alertname"], each["labels"].get("process"), each["labels"].get("node"))
        == ("UdpwatchServerAnswersWrongly", SERVER, "worker-1")
    ]
    assert wrong["labels"]["severity"] == "warning"
    assert wrong["annotations"]["summary"] == f"{SERVER} replies from the wrong address on UDP port {PORT}"
    for alert in alerts("firing"):
        text = " ".join(alert["annotations"].values())
        assert "<" not in text and "%!" not in text and "{{" not in text and "  " not in text, text


def test_top_shows_the_rows_that_prometheus_has(prometheus: Prometheus) -> None:
    def found() -> set[tuple[str, str, int, str | None]]:
        with prometheus.scene.node.entered():
            done = run_cli("top", "--once", "--json", "--prometheus", f"http://{LISTEN}")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        findings = {(each["node"], each["process"], each["port"], each["pod"]) for each in told["findings"]}
        return findings | {(each["node"], each["verdict"], each["port"], each["pod"]) for each in told["healed"]}

    wanted = {("worker-1", SERVER, PORT, None), ("worker-2", "unbound", 53, "resolver-hxk4t")}
    wait_for(lambda: wanted | {("worker-1", "healed", HEALED_PORT, None)} <= found(), "both nodes' findings")


def test_promtool_accepts_the_exported_metrics(prometheus: Prometheus) -> None:
    """The agent has everything enabled."""
    with prometheus.scene.node.entered(), urllib.request.urlopen(f"http://{prometheus.agents[0]}/metrics") as answer:
        exposed = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
