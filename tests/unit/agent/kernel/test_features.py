"""Offsets from the kernel's own types: the place and size of a member, and the BTF that has it."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from repository import BPF

from udpwatch.agent.kernel import features
from udpwatch.agent.kernel.libbpf import Btf

OF_CONNTRACK = ("nf_conn", "nf_conntrack_tuple_hash")
_INT, _POINTER, _STRUCT, _ENUM, _TYPEDEF = 1, 2, 4, 6, 8  # BTF_KIND_*
_FOLLOWED = {_TYPEDEF, 9, 10, 11}  # and volatile, const, restrict

pytestmark = [
    pytest.mark.skipif(
        not features.VMLINUX_BTF.exists(), reason="this kernel has no BTF: boot one with CONFIG_DEBUG_INFO_BTF=y"
    ),
    pytest.mark.skipif(not ctypes.util.find_library("bpf"), reason="needs libbpf.so.1: apt-get install libbpf1"),
]


# ---- conntrack's types in its module ----


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Return this kernel's types without those of conntrack."""
    content = features.VMLINUX_BTF.read_bytes()
    for name in OF_CONNTRACK:
        content = content.replace(f"\0{name}\0".encode(), f"\0xx{name[2:]}\0".encode())
    path = tmp_path / "vmlinux"
    path.write_bytes(content)
    return path


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /sys/kernel/btf."""
    monkeypatch.setattr(features, "MODULE_BTF", tmp_path)
    return tmp_path


def write_split(path: Path, base: Path) -> None:
    """Write a module's BTF on top of the kernel's, with structures of conntrack laid out as no kernel has them."""
    with closing(Btf(base)) as kernel:
        lib = kernel._libbpf
        lib.btf__new_empty_split.restype, lib.btf__new_empty_split.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        lib.btf__raw_data.restype = ctypes.c_void_p
        split = ctypes.c_void_p(lib.btf__new_empty_split(kernel._btf))

        def of_kernel(name: str, kind: int) -> int:
            found: int = lib.btf__find_by_name_kind(kernel._btf, name.encode(), kind)
            assert found > 0, name
            return found

        def structure(name: str, size: int, **members: tuple[int, int]) -> int:
            made: int = lib.btf__add_struct(split, name.encode(), size)
            for member, (type_id, at) in members.items():
                assert lib.btf__add_field(split, member.encode(), type_id, at * 8, 0) == 0
            return made

        tuple_id, long_id = of_kernel("nf_conntrack_tuple", _STRUCT), of_kernel("long unsigned int", _INT)
        hash_id = structure("nf_conntrack_tuple_hash", 100, tuple=(tuple_id, 20))
        structure(
            "nf_conn",
            4000,
            tuplehash=(lib.btf__add_array(split, long_id, hash_id, 2), 1000),
            status=(long_id, 2000),
            ct_net=(of_kernel("possible_net_t", _TYPEDEF), 3000),
        )
        size = ctypes.c_uint32()
        path.write_bytes(ctypes.string_at(lib.btf__raw_data(split, ctypes.byref(size)), size.value))
        lib.btf__free(split)


def test_offsets_come_from_the_modules_types(kernel: Path, modules: Path) -> None:
    write_split(modules / "nf_conntrack", kernel)
    found = features.conntrack_offsets(kernel)
    assert (found.pop("OFFSET_TUPLE_ORIGINAL"), found.pop("OFFSET_TUPLE_REPLY")) == (1020, 1120)
    of_the_kernel = features.conntrack_offsets(features.VMLINUX_BTF)
    assert found.items() <= of_the_kernel.items()
    found = features.flow_offsets(kernel)
    assert (found.pop("OFFSET_CT_STATUS"), found.pop("OFFSET_CT_NET")) == (2000, 3000)
    assert "OFFSET_CT_ZONE" not in found
    assert found.items() <= features.flow_offsets(features.VMLINUX_BTF).items()


def test_missing_module_is_an_error(kernel: Path, modules: Path) -> None:
    with pytest.raises(LookupError, match=rf"struct nf_conn, nor does {modules}/nf_conntrack \(No such file"):
        features.conntrack_offsets(kernel)


def test_module_without_the_types_is_an_error(kernel: Path, modules: Path) -> None:
    (modules / "nf_conntrack").touch()
    with pytest.raises(LookupError, match=r"struct nf_conn, nor does .* \(not BTF\)"):
        features.flow_offsets(kernel)


# ---- sizes of members ----


class Sizes(Btf):
    """Gives the size of a member in place of its offset."""

    def bit_offset(self, structure: str, path: str) -> int:
        return 8 * self.offset(structure, path)

    def offset(self, structure: str, path: str) -> int:
        type_id = self._libbpf.btf__find_by_name_kind(self._btf, structure.encode(), _STRUCT)
        for name in path.split("."):
            member = self._member(type_id, name)
            if member is None:
                raise LookupError(path)
            type_id = member[1]
        while (kind := self._type(type_id).info >> 24 & 0x1F) in _FOLLOWED:
            type_id = self._type(type_id).size_or_type
        if kind == _POINTER:
            return 8
        size = self._type(type_id).size_or_type if kind in (_INT, _ENUM) else 0
        return size if path != "sk_userlocks" else 1  # a bit-field within one byte


def reads(text: str) -> Iterator[tuple[str, int]]:
    """Find (OFFSET_ name, bytes) of each read_kernel*(... + OFFSET_...), nested ones as well."""
    inner = re.compile(r"(read_kernel(\d*)|\w*)\(([^()]*)\)")
    while match := inner.search(text):
        offset = re.search(r"OFFSET_\w+", match[3])
        if match[1].startswith("read_kernel") and offset:
            yield offset[0], int(match[2] or 64) // 8
        text = text[: match.start()] + "_" + text[match.end() :]


def test_members_are_read_at_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a big-endian machine, a wider read would take the neighbour for the member."""
    monkeypatch.setattr(features, "Btf", Sizes)
    sizes = features.conntrack_offsets() | features.flow_offsets()
    found = {each for path in BPF.glob("*.[ch]") for each in reads(path.read_text())}
    assert len(found) >= 15
    assert {(name, size) for name, size in found if sizes.get(name, size) != size} == set()
