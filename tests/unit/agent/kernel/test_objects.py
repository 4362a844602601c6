"""Compiled programs as data: maps by index, and which cache file may be used, since root loads it into the kernel."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udpwatch.agent.kernel import objects
from udpwatch.agent.kernel.bpf import MapDefinition, registers
from udpwatch.agent.kernel.objects import MAX_FILES, CompileCache, Object, decode, encode, name_maps

KEY, OTHER_KEY = "0" * 64, "1" * 64
OBJECT = Object(
    compiler="bcc 0.26.0",
    maps=(MapDefinition("flows", 9, 40, 48, 65_536, 0), MapDefinition("events", 27, 0, 0, 1 << 18, 0)),
    programs={"ingress": bytes.fromhex("b7000000010000009500000000000000"), "egress": b""},
)


def load_immediate(kind: int, number: int) -> bytes:
    """Return LD_IMM64 into r1, which takes two slots."""
    return struct.pack("=BBhi", 0x18, registers(1, kind), 0, number) + bytes(8)


MOVE = struct.pack("=BBhi", 0xB7, registers(1, 1), 0, 7)  # r1 = 7, with bits set where a load has its kind


# ---- maps in instructions ----


def test_map_descriptors_become_indices() -> None:
    code = MOVE + load_immediate(1, 7) + load_immediate(0, 7) + load_immediate(1, 9)
    assert name_maps(code, {7: 0, 9: 1}) == MOVE + load_immediate(1, 0) + load_immediate(0, 7) + load_immediate(1, 1)


@given(st.lists(st.integers(0, 1000)), st.permutations(range(1001)))
def test_map_indices_become_descriptors_again(fds: list[int], indices: list[int]) -> None:
    code = MOVE + b"".join(load_immediate(1, fd) for fd in fds)
    there = dict(enumerate(indices))
    back = {index: fd for fd, index in there.items()}
    assert name_maps(name_maps(code, there), back) == code


def test_unknown_map_is_refused() -> None:
    with pytest.raises(LookupError, match="instruction 1 names the unknown map 7"):
        name_maps(MOVE + load_immediate(1, 7), {})


def test_unknown_kind_of_constant_is_refused() -> None:
    """BPF_PSEUDO_MAP_VALUE, which bcc does not generate."""
    with pytest.raises(LookupError, match="instruction 0 loads a constant of the unknown kind 2"):
        name_maps(load_immediate(2, 7), {7: 0})


@pytest.mark.parametrize(("order", "both"), [("little", 0x13), ("big", 0x31)])
def test_registers_are_in_the_machines_byte_order(monkeypatch: pytest.MonkeyPatch, order: str, both: int) -> None:
    """Destination 3, source 1, which is how a load says that it names a map."""
    monkeypatch.setattr(sys, "byteorder", order)
    assert registers(3, 1) == both
    with pytest.raises(LookupError, match="names the unknown map 7"):
        name_maps(struct.pack("=BBhi", 0x18, both, 0, 7) + bytes(8), {})


# ---- a file's content ----


def test_written_content_is_read_back() -> None:
    assert decode(KEY, encode(KEY, OBJECT)) == OBJECT


def test_damaged_content_is_refused() -> None:
    """Each byte is changed, and each end is cut off."""
    content = encode(KEY, OBJECT)
    damaged = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(len(content))]
    for each in [*damaged, *(content[:at] for at in range(len(content))), content + b" "]:
        with pytest.raises(ValueError, match="damaged"):
            decode(KEY, each)


def test_content_of_another_key_is_refused() -> None:
    with pytest.raises(ValueError, match="another key"):
        decode(OTHER_KEY, encode(KEY, OBJECT))


# ---- the key ----


def test_key_depends_on_everything_that_is_compiled(tmp_path: Path) -> None:
    header = tmp_path / "include/linux/types.h"
    header.parent.mkdir(parents=True)
    header.write_text("")
    (tmp_path / "sockets.c").write_text("int x;")

    def key(source: str = "sockets.c", **constants: int) -> str:
        return objects.key(tmp_path, source, {"A": 1, "B": 2, **constants})

    before = key()
    assert before == objects.key(tmp_path, "sockets.c", {"B": 2, "A": 1})
    different = {before, key("conntrack.c"), key(A=2), key(C=3)}
    header.write_text("int y;")
    different.add(key())
    (tmp_path / "sockets.c").write_text("int z;")
    different.add(key())
    (tmp_path / "new.h").touch()
    different.add(key())
    assert len(different) == 7
    (tmp_path / "notes.md").touch()
    assert key() in different


# ---- the folder ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "made" / "by it"


def test_folder_is_created(folder: Path) -> None:
    cache = CompileCache(folder)
    assert cache.get(KEY) is None
    cache.put(KEY, OBJECT)
    assert cache.get(KEY) == OBJECT
    assert cache.get(OTHER_KEY) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def test_without_a_folder_nothing_is_cached() -> None:
    cache = CompileCache(None)
    cache.put(KEY, OBJECT)
    assert cache.get(KEY) is None


def _replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o620),
        lambda path: path.chmod(0o602),
        lambda path: path.parent.chmod(0o770),
        lambda path: path.parent.chmod(0o1707),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(encode(OTHER_KEY, OBJECT)),
        _replace_by_link,
        _replace_by_fifo,
    ],
    ids=[
        "group writes",
        "others write",
        "folder: group",
        "folder: others",
        "truncated",
        "empty",
        "other key",
        "link",
        "fifo",
    ],
)
def test_unsafe_or_damaged_file_is_not_used(folder: Path, spoil: Callable[[Path], None]) -> None:
    cache = CompileCache(folder)
    cache.put(KEY, OBJECT)
    spoil(folder / f"{KEY}.json")
    assert cache.get(KEY) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which may give files away: run `make test` as root")
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_file_or_folder_of_another_user_is_not_used(folder: Path, whose: str) -> None:
    cache = CompileCache(folder)
    cache.put(KEY, OBJECT)
    os.chown(folder / f"{KEY}.json" if whose == "file" else folder, 65534, 65534)
    assert cache.get(KEY) is None
    cache.put(KEY, OBJECT)  # a file is replaced by our own; a folder is left alone
    assert (cache.get(KEY) == OBJECT) == (whose == "file")


@pytest.mark.parametrize("folder", [Path("/proc/nowhere"), Path("/dev/null"), Path("/dev/null/x")])
def test_folder_that_cannot_be_created_is_ignored(folder: Path) -> None:
    CompileCache(folder).put(KEY, OBJECT)
    assert CompileCache(folder).get(KEY) is None


def test_least_recently_used_files_make_room(folder: Path) -> None:
    cache = CompileCache(folder)
    keys = [f"{number:064x}" for number in range(MAX_FILES)]
    for age, key in enumerate(reversed(keys)):
        cache.put(key, OBJECT)
        os.utime(folder / f"{key}.json", (1000 - age, 1000 - age))
    left, other = folder / f".{KEY}.json.1234", folder / "somebody's.json"
    for path in (left, other):  # of a writer that was killed; and what is none of ours
        path.touch()
        os.utime(path, (1, 1))
    assert cache.get(keys[0]) == OBJECT  # the oldest, but for this
    cache.put("f" * 64, OBJECT)
    assert not left.exists()
    assert other.exists()
    assert [cache.get(key) is not None for key in keys] == [True, False, *[True] * (MAX_FILES - 2)]
