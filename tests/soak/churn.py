"""Pods that come and go: each has a cgroup, a network namespace, and a server that replies a known number of times."""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import socket
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from machine import name_pod
from scene import V4, V6, Family
from tally import Tally
from waiting import wait_for

from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost, Lab

GUEST = "pods"
SECONDS = 2.0  # from one pod to the next
LIVING = 3
MOST_REPLIES = 20
RIGHT_EVERY = 4  # each fourth pod replies rightly
FIRST_PORT, PORTS = 10_000, 20_000
REPLY_SECONDS = 1.0
KUBEPODS = "kubepods/burstable"
NAMESPACE = "soak"


def run(host: ContainerHost, cgroup: Path, log: Path, done: Path, tally: Tally) -> None:
    """Start pods, each beside the last few, until "ending" is 1. A line of ``done`` holds a pod's wrong replies."""
    living: deque[AbstractContextManager[int]] = deque()
    number = 0
    while not tally["ending"]:
        time.sleep(SECONDS)
        tally.pass_gate(GUEST)
        pod = _pod(host, cgroup, log, number)
        wrong = pod.__enter__()
        living.append(pod)
        with done.open("a") as file:
            print(json.dumps({"port": _port(number), "wrong": wrong}), file=file)
        if len(living) > LIVING:
            living.popleft().__exit__(None, None, None)
        number += 1
    while living:
        living.popleft().__exit__(None, None, None)
    tally["pods ended"] = 1
    while True:
        tally.pass_gate(GUEST)
        time.sleep(SECONDS)


def read(done: Path) -> dict[int, int]:
    """Return the wrong replies of all pods so far, by port."""
    lines = done.read_text().splitlines() if done.exists() else []
    return {pod["port"]: pod["wrong"] for pod in map(json.loads, lines)}


def _port(number: int) -> int:
    return FIRST_PORT + number % PORTS


def _addresses(number: int, family: Family) -> tuple[str, str]:
    """Return a pod's own address and another one, from which routing never replies. Those of former pods are not used
    again: neighbours may still remember their devices.
    """
    high, low = divmod(number, 250)
    if family is V4:
        return f"172.17.{128 + high % 120}.{low + 1}", f"172.17.{1 + high % 120}.{low + 1}"
    return f"fd00:17::a:{number + 1:x}", f"fd00:17::b:{number + 1:x}"


@contextmanager
def _pod(host: ContainerHost, cgroup: Path, log: Path, number: int) -> Iterator[int]:
    """Run a pod during the body. Before that, its server replies to all its requests; yields how many were wrong."""
    family, is_right = (V4, V6)[number % 2], number % RIGHT_EVERY == 0
    own, asked = _addresses(number, family)
    name, uid, container = f"pod-{number}", str(uuid.uuid4()), uuid.uuid4().hex * 2
    folder = cgroup / KUBEPODS / f"pod{uid}" / container
    folder.mkdir(parents=True)
    name_pod(log, NAMESPACE, name, uid, "app", container)
    replies = random.randint(1, MOST_REPLIES)  # noqa: S311
    with Lab() as lab:
        pod = lab.namespace(name)
        lab.link(host.node, f"pod{number}", pod, "eth0")
        host.node.ip(f"link set pod{number} master docker0")
        bits, late = (16, "") if family is V4 else (64, "nodad preferred_lft 0")
        early = "" if family is V4 else "nodad"
        pod.ip(f"addr add {own}/{bits} dev eth0 {early}", f"addr add {asked}/{bits} dev eth0 {late}")
        with pod.socket(family.inet) as link, host.container.socket(family.inet) as client:
            servers.enable_pktinfo(link)
            link.bind((family.wildcard, _port(number)))
            server = pod.spawn("pod-server", functools.partial(_serve, link, folder, replies, is_right))
            link.close()
            client.settimeout(REPLY_SECONDS)
            for _ in range(replies):
                _request(client, asked, _port(number))
        yield 0 if is_right else replies
        server.stop()
    for each in (folder, folder.parent):
        wait_for(lambda each=each: _removed(each), f"{each} to be empty")
    shutil.rmtree(log / "pods" / f"{NAMESPACE}_{name}_{uid}")
    (log / "containers" / f"{name}_{NAMESPACE}_app-{container}.log").unlink()


def _serve(link: socket.socket, cgroup: Path, replies: int, is_right: bool) -> None:
    (cgroup / "cgroup.procs").write_text("0")
    for _ in range(replies):
        data, control, _, peer = link.recvmsg(100, socket.CMSG_SPACE(32))
        level, kind, asked = control[0]
        link.sendmsg([data], [(level, kind, servers.reply_control(asked))] if is_right else [], 0, peer)
    signal.pause()


def _request(client: socket.socket, address: str, port: int) -> None:
    def has_reply() -> bool:
        client.sendto(b"request", (address, port))
        try:
            client.recvfrom(100)
        except TimeoutError:
            return False
        return True

    wait_for(has_reply, f"a reply of {address}")


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
