"""What the commands say about a server that udpwatch heals."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from agents import run_cli
from scene import V4, bound
from scene_agent import InNamespace
from waiting import wait_for

from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost


def test_healed_server_is_shown_as_right_and_as_to_be_fixed(host: ContainerHost, folder: Path, port: int) -> None:
    with contextlib.ExitStack() as opened:
        agent = opened.enter_context(InNamespace(host, folder, "--no-dns", f"--heal={port}"))
        served = opened.enter_context(bound(host.node, V4.inet, V4.wildcard, port))
        server = host.node.spawn("healed-server", lambda: servers.plain(served))
        opened.callback(server.stop)
        served.close()
        client = opened.enter_context(host.container.socket())
        client.settimeout(5)
        client.connect((host.ETH0, port))
        for _ in range(7):
            client.send(b"request")
            assert client.recv(100)
        wait_for(lambda: agent.metric("udpwatch_healed_replies_total", port=str(port)) == 7, "the counts")
        connect = f"--connect={agent.socket}"

        told = json.loads(run_cli("top", "--once", "--json", "--interval=0.2", connect).stdout)
        assert port not in {each["port"] for each in told["findings"]}
        assert [(each["process"], each["total"]) for each in told["healed"] if each["port"] == port] == [
            ("healed-server", 7)
        ]
        assert told["nodes"][0]["healing"]["active"]

        with host.node.entered():
            done = run_cli("explain", str(port), "--seconds=0.5", connect)
            audit = run_cli("audit", "--json", connect)
        assert done.returncode == 0, done.stdout + done.stderr
        text = " ".join(done.stdout.split())
        assert f"port {port}/udp, and replied from that address, because udpwatch heals its replies (7 times" in text
        assert "The server still needs the fix" in text
        assert "left from another address" not in text

        assert audit.returncode == 1, "its socket is at risk as before"
        (found,) = [each for each in json.loads(audit.stdout)["servers"] if each["port"] == port]
        assert (found["risk"], found["seen"]) == ("virtual", [])
        assert found["healed"] == [{"asked": host.ETH0, "count": 7}]

        events = run_cli("events", "--no-follow", "--verdict=healed", f"--port={port}", connect)
        assert events.stdout.count(f"{host.ETH0} ") >= 7
