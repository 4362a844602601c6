"""Names of Docker's containers, from state files that the tests write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from udpwatch.agent.attribution import docker
from udpwatch.agent.attribution.docker import DockerNames

ID = "3f2a" * 16


def state(root: Path, content: bytes, number: str = ID) -> Path:
    folder = root / "containers" / number
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.v2.json").write_bytes(content)
    return root


def test_name_is_read_from_the_state_file(tmp_path: Path) -> None:
    names = DockerNames(state(tmp_path, json.dumps({"ID": ID, "Name": "/web-1"}).encode()))
    assert names.lookup(ID, 0) == "web-1"
    state(tmp_path, b'{"Name": "/web-2"}')
    assert names.lookup(ID, docker.KEEP_SECONDS - 1) == "web-1"
    assert names.lookup(ID, docker.KEEP_SECONDS + 1) == "web-2"
    assert names.lookup("4" * 64, 0) == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"Name": 7}', b'{"Name": null}', b"\xff\xfe", b"[" * 200_000],
    ids=["empty", "truncated", "list", "null", "no name", "number", "null name", "not UTF-8", "deep"],
)
def test_invalid_state_file_gives_no_name(tmp_path: Path, content: bytes) -> None:
    assert DockerNames(state(tmp_path, content)).lookup(ID, 0) == ""


def test_state_file_that_is_too_large_gives_no_name(tmp_path: Path) -> None:
    content = {"Name": "/web-1", "Env": "x" * docker.MAX_FILE_BYTES}
    assert DockerNames(state(tmp_path, json.dumps(content).encode())).lookup(ID, 0) == ""


def test_control_characters_in_a_name_are_escaped(tmp_path: Path) -> None:
    content = json.dumps({"Name": "/a\x1b[2J\ud800\u202e"}).encode()
    assert DockerNames(state(tmp_path, content)).lookup(ID, 0) == r"a\x1b[2J\ud800\x202e"
