"""The code that `udpwatch explain` shows, compiled and run: its client gets the reply from the address it asked."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import wait_for

from udpwatch.agent.client.remedies import Code, codes
from udpwatch.agent.testing import servers
from udpwatch.agent.testing.lab import ContainerHost

PORT = 5000  # that all the programs bind
CODES = {code.language: code for code in codes()}


def compiled_c(code: Code, folder: Path) -> list[str]:
    source, program = folder / "answer.c", folder / "answer"
    source.write_text(code.text)
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-o", program, source], check=True)
    return [str(program)]


def script(interpreter: str) -> Callable[[Code, Path], list[str]]:
    def write(code: Code, folder: Path) -> list[str]:
        path = folder / "answer.txt"
        path.write_text(code.text)
        return [interpreter, str(path)]

    return write


@contextmanager
def serving(host: ContainerHost, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = host.node.popen(command)
    try:
        yield process
        assert process.poll() is None
    finally:
        process.kill()
        said = process.communicate()
    assert said == (b"", b"")


def answer(host: ContainerHost, address: str) -> bytes:
    """Return what a client with a connected socket receives; its kernel drops replies from other addresses."""
    with host.container.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
        client.settimeout(0.2)
        client.connect((address, PORT))
        try:
            client.send(b"request")
            return client.recv(100)
        except OSError:
            return b""


# Go and Rust need libraries that are not here (golang.org/x/net, the crate nix). Both were built by hand, with
# Debian's packages of these, and answered rightly in this lab.
@pytest.mark.parametrize(
    ("language", "tool", "prepare"),
    [
        ("C", "gcc", compiled_c),
        ("Python", sys.executable, script(sys.executable)),
        ("Node.js", "node", script("node")),
    ],
    ids=["C", "Python", "Node.js"],
)
def test_code_of_each_remedy_replies_from_the_address_asked(
    host: ContainerHost, tmp_path: Path, language: str, tool: str, prepare: Callable[[Code, Path], list[str]]
) -> None:
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}: apt-get install {'nodejs' if tool == 'node' else tool}")
    with serving(host, prepare(CODES[language], tmp_path)) as process:
        for address in (host.ETH0, host.DOCKER0, host.ETH0_6, host.DOCKER0_6):

            def answered_or_ended(address: str = address) -> bool:
                return answer(host, address) == b"request" or process.poll() is not None

            wait_for(answered_or_ended, f"an answer from {address}")
            assert process.poll() is None


def test_plain_server_does_not_reply_from_the_address_asked(host: ContainerHost) -> None:
    """With the same client and the same addresses: the lab is not what makes the replies right."""
    with host.node.socket() as server:
        server.bind(("0.0.0.0", PORT))
        process = host.node.spawn("plain", lambda: servers.plain(server))
        try:
            wait_for(lambda: answer(host, host.DOCKER0) == b"reply to request", "an answer from the near address")
            assert answer(host, host.ETH0) == b""
        finally:
            process.stop()
