"""`udpwatch explain PORT` without a finding: who listens, the receive buffer, and replies; provoked for real."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from agents import COMMAND, Agent, as_nobody, run_cli
from looks import CLIENT, SECOND, SERVER, SERVER_6, asking, explain, serve, server_and_client
from waiting import wait_for
from wrong_replies import wrong_replies

from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.testing.lab import ContainerHost, Lab, Namespace


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def pair(lab: Lab) -> tuple[Namespace, Namespace]:
    return server_and_client(lab)


# 1: nothing listens --------------------------------------------------------------------------------------------------


def test_port_without_a_socket_is_asked_in_vain(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"not-listening"}
    text = told.get("not-listening")["text"]
    assert f"No socket listens on port {port}/udp here." in text
    assert f"requests arrived for {SERVER} in 1 s and found none; the kernel counted" in text
    assert "ICMP destination unreachable, for all ports together" in text


def test_broadcast_without_a_socket(pair: tuple[Namespace, Namespace], port: int) -> None:
    """The kernel neither counts NoPorts nor sends ICMP for it."""
    server, client = pair

    def broadcast() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            while True:
                made.sendto(b"question", ("10.0.0.255", port))
                time.sleep(0.02)

    process = client.spawn("broadcast", broadcast)
    told = explain(server, port)
    process.stop()
    text = told.get("not-listening")["text"]
    assert re.search(
        r"requests arrived for 10\.0\.0\.255 in 1 s and found none; the kernel counted \d+ datagrams", text
    )
    assert "to groups without a socket (IgnoredMulti)" in text


def test_port_without_a_socket_and_without_requests(pair: tuple[Namespace, Namespace], port: int) -> None:
    told = explain(pair[0], port)
    assert told.kinds == {"not-listening"}
    assert "found none" not in told.get("not-listening")["text"]


def test_socket_of_tcp_alone_is_named(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, _ = pair
    with server.socket(kind=socket.SOCK_STREAM) as listener:
        listener.bind(("0.0.0.0", port))
        listener.listen()
        told = explain(server, port)
    assert told.kinds == {"only-tcp"}


# 2: it listens elsewhere ---------------------------------------------------------------------------------------------


def test_server_on_loopback_is_not_reached(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, "127.0.0.1")
    told = explain(server, port)
    assert told.kinds == {"other-address"}
    assert f"let it listen on {SERVER}, {SECOND} and {SERVER_6}" in told.get("other-address")["text"]
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-address"}
    text = told.get("other-address")["text"]
    assert f"arrived for {SERVER} in 1 s, and the server listens only on 127.0.0.1:{port}; the kernel counted" in text


def test_server_on_loopback_that_is_asked_there_is_right(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, _ = pair
    serve(server, port, "127.0.0.1")
    with asking(server, "127.0.0.1", port):
        assert explain(server, port).kinds == set()


def test_server_on_another_address(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, SERVER)
    with asking(client, SECOND, port), asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-address"}
    assert f"Let it listen on {SECOND}" in told.get("other-address")["text"]
    assert "replies" in {each["kind"] for each in told.report["statements"]}
    # Without a request, the address that the user names tells.
    assert explain(server, port, f"--address={SECOND}").kinds == {"other-address"}
    assert explain(server, port, f"--address={SERVER}").kinds == set()
    missing = explain(server, port, "--address=192.0.2.1")
    assert missing.kinds == {"not-local"}
    assert "192.0.2.1 is not an address of this machine" in missing.get("not-local")["text"]


def test_server_of_ipv4_asked_over_ipv6(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    with asking(client, SERVER_6, port):
        told = explain(server, port)
    assert told.kinds == {"other-family"}
    assert f"Let it listen on :: or {SERVER_6}, too." in told.get("other-family")["text"]


def test_server_of_ipv6_only_asked_over_ipv4(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, "::", prepare=lambda made: made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1))
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-family"}
    assert "IPV6_V6ONLY limits to IPv6" in told.get("other-family")["text"]
    with asking(client, SERVER_6, port):
        assert explain(server, port).kinds == set()


def test_server_of_both_families(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, "::", prepare=lambda made: made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0))
    with asking(client, SERVER, port), asking(client, SERVER_6, port):
        told = explain(server, port)
    assert told.kinds == set()
    assert (
        f"at {SERVER} and {SERVER_6}" in told.get("replies")["text"]
        or f"at {SERVER_6} and {SERVER}" in told.get("replies")["text"]
    )


def test_server_bound_to_another_device(pair: tuple[Namespace, Namespace], lab: Lab, port: int) -> None:
    server, client = pair
    other = lab.namespace("other")
    lab.link(server, "eth1", other, "eth0")
    serve(server, port, prepare=lambda made: made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1"))
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"other-device"}
    text = told.get("other-device")["text"]
    assert f"0.0.0.0:{port} on device eth1" in text
    assert "they came through eth0" in text


def test_server_connected_to_one_peer(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    with server.socket() as made:
        made.bind((SERVER, port))
        made.connect((CLIENT, 9))
        with asking(client, SERVER, port):
            told = explain(server, port)
    assert told.kinds == {"other-peer"}
    assert f"connected to {CLIENT}:9" in told.get("other-peer")["text"]


def test_server_in_another_namespace_is_named(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(server, port)
    told = explain(client, port)
    assert told.kinds == set()
    text = told.get("other-namespace")["text"]
    assert f"It listens elsewhere: test-server (pid {process.pid}) in the network namespace of test-server" in text
    with asking(client, "127.0.0.1", port):
        told = explain(client, port)
    assert told.kinds == {"other-namespace"}


# 3, 4: the receive buffer --------------------------------------------------------------------------------------------


def test_drops_in_a_tiny_receive_buffer_are_counted(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(
        server,
        port,
        answer=False,
        prepare=lambda made: made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1),
    )
    os.kill(process.pid, signal.SIGSTOP)
    with asking(client, SERVER, port, pause=0.001, packet=bytes(1000)):
        told = explain(server, port)
    statement = told.get("receive-buffer")
    assert statement["wrong"]
    assert "The receive buffer of 2,304 bytes of test-server was full" in statement["text"]
    assert "The server sets the size itself (SO_RCVBUF)" in statement["text"]
    assert statement["fix"] is None


def test_drops_in_a_default_receive_buffer_name_the_sysctl(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(server, port)
    os.kill(process.pid, signal.SIGSTOP)
    with client.socket() as sender:
        for _ in range(1000):
            sender.sendto(bytes(1000), (SERVER, port))
    told = explain(server, port)
    statement = told.get("receive-buffer")
    assert not statement["wrong"]  # they are from before
    assert re.match(r"test-server lost [\d,]+ datagrams since the socket was opened, none in this", statement["text"])
    assert statement["fix"].startswith("sysctl -w net.core.rmem_default=")
    assert told.kinds == {"not-read"}


def test_stopped_server_does_not_read(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    process = serve(server, port)
    os.kill(process.pid, signal.SIGSTOP)
    with asking(client, SERVER, port, pause=0.2):
        told = explain(server, port)
    assert told.kinds == {"not-read"}
    statement = told.get("not-read")
    assert "test-server does not read its requests:" in statement["text"]
    assert "The process is stopped (state T)." in statement["text"]
    assert statement["fix"] == f"kill -CONT {process.pid}"


def test_server_that_sleeps_does_not_read(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    with server.socket() as made:
        made.bind((SERVER, port))
        with asking(client, SERVER, port, pause=0.2):
            told = explain(server, port)
    assert told.kinds == {"not-read"}
    assert "(state S)" in told.get("not-read")["text"]


def test_state_of_one_thread_is_not_that_of_the_process(pair: tuple[Namespace, Namespace], port: int) -> None:
    """The main thread sleeps while another one is busy: neither says why requests are not read."""
    server, client = pair

    def run() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as made:
            made.bind((SERVER, port))

            def spin() -> None:
                while True:
                    pass

            threading.Thread(target=spin, daemon=True).start()
            signal.pause()

    process = server.spawn("busy-server", run)
    with asking(client, SERVER, port, pause=0.1):
        told = explain(server, port)
    process.stop()
    assert told.kinds == {"not-read"}
    assert "(state " not in told.get("not-read")["text"]


def test_server_that_reads_and_does_not_reply(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port, answer=False)
    with asking(client, SERVER, port):
        told = explain(server, port)
    assert told.kinds == {"no-reply"}
    text = told.get("no-reply")["text"]
    assert "arrived in 1 s and no reply left; the server reads them" in text


# 7: it works ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [SERVER, SERVER_6])
def test_server_that_replies_rightly(pair: tuple[Namespace, Namespace], port: int, address: str) -> None:
    server, client = pair
    serve(server, port, address)
    with asking(client, address, port):
        told = explain(server, port)
    assert told.kinds == set()
    assert f"in 1 s, at {address}." in told.get("replies")["text"]


def test_numbers_are_exact(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    command = subprocess.Popen(
        [*COMMAND, "explain", str(port), "--seconds=4", "--connect=/none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=server.enter_in_child,
    )

    def is_watched() -> bool:
        return str(port) in server.run(["ss", "-l", "-n", "-p", "--packet"]) or "p_dgr" in server.run(
            ["ss", "-0", "-n"]
        )

    wait_for(is_watched, "the packet socket")
    with client.socket() as asker:
        for _ in range(123):
            asker.sendto(b"question", (SERVER, port))
            asker.recv(100)
    text = " ".join(command.communicate()[0].split())
    assert command.returncode == 0
    assert "123 requests of 1 client socket, 123 replies in 4 s" in text


def test_wrong_source_without_an_agent(pair: tuple[Namespace, Namespace], port: int) -> None:
    server, client = pair
    serve(server, port)
    with asking(client, SECOND, port):
        told = explain(server, port)
    assert told.kinds == {"wrong-source"}
    statement = told.get("wrong-source")
    assert f"(asked at {SECOND}, replied from {SERVER})" in statement["text"]
    assert "sendmsg() with a control message" in statement["remedy"]["do"]  # of a Python program


# what it may see -----------------------------------------------------------------------------------------------------


def test_kernels_own_socket(pair: tuple[Namespace, Namespace]) -> None:
    """Packets of a tunnel count as requests; the kernel takes them without counting them as read."""
    port = 4789
    try:
        for host, own, other in ((pair[0], SERVER, CLIENT), (pair[1], CLIENT, SERVER)):
            host.ip(f"link add vx type vxlan id 7 local {own} remote {other} dstport {port}", "link set vx up")
            host.ip(f"addr add 10.7.0.{own[-1]}/24 dev vx")
    except UdpwatchError as error:
        pytest.skip(f"needs VXLAN devices (CONFIG_VXLAN): {error}")
    with asking(pair[1], "10.7.0.1", 5):
        told = explain(pair[0], port)
    assert told.kinds == set()
    (text, _) = (each["text"] for each in told.report["statements"] if each["kind"] == "listens")
    assert text.startswith("The kernel itself (a tunnel such as VXLAN), or a process of uid 0 that this user may not")


def test_without_privileges_it_names_what_it_could_not_look_at(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", port))
        done = run_cli("explain", str(port), "--json", "--seconds=1", "--connect=/none", wrapper=as_nobody())
    assert done.stderr == ""
    report = json.loads(done.stdout)
    listens = next(each["text"] for each in report["statements"] if each["kind"] == "listens")
    assert f"a process of uid {os.getuid()} that this user may not examine, listens on 127.0.0.1:{port}." in listens
    unseen = " ".join(report["unseen"])
    assert "datagrams were not counted at the devices of this network namespace (needs CAP_NET_RAW" in unseen
    assert re.search(r"the network namespaces of \d+ processes that this user may not open", unseen)
    assert "nft: " in unseen


def test_agents_counts_are_added(agent: Agent, host: ContainerHost, port: int) -> None:
    serve(host.node, port)

    def counted() -> bool:
        return any(each["port"] == port and each["requests"] for each in agent.snapshot()["servers"])

    with asking(host.outside, host.ETH0, port):
        wait_for(counted, "the agent's count")
        done = run_cli(
            *("explain", str(port), "--seconds=1", f"--connect={agent.socket}"), preexec_fn=host.node.enter_in_child
        )
    assert done.returncode == 0
    assert f"no wrong reply of '{port}' so far; looking at port {port}/udp for 1 s" in done.stderr
    text = " ".join(done.stdout.split())
    assert re.search(r"It replies from the address that was asked: .* The agent has counted [\d,]+ requests", text)


def test_finding_of_the_agent_comes_first(agent: Agent, host: ContainerHost, port: int) -> None:
    """Without a look, as before: the finding says more."""
    wrong_replies(host, port)
    agent.counted(port, 1)
    done = run_cli("explain", str(port), f"--connect={agent.socket}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "was asked at" in done.stdout


def test_in_the_agents_pod_the_agents_counts_are_what_is_known(agent: Agent, host: ContainerHost, port: int) -> None:
    """With the chart's capabilities, no other namespace can be entered."""
    serve(host.node, port)

    def counted() -> bool:
        return any(each["port"] == port and each["requests"] for each in agent.snapshot()["servers"])

    chart = ("setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon")
    with asking(host.outside, host.ETH0, port):
        wait_for(counted, "the agent's count")
        done = run_cli("explain", str(port), "--json", "--seconds=4", f"--connect={agent.socket}", wrapper=chart)
    report = json.loads(done.stdout)
    texts = " ".join(each["text"] for each in report["statements"])
    assert "By the agent, test-server (pid " in texts
    assert re.search(r"listens on 0\.0\.0\.0:\d+: [1-9]\d* requests and [1-9]\d* replies in 4 s", texts)
    assert not report["wrong"]
    assert "needs CAP_NET_RAW" in " ".join(report["unseen"])
