"""Create maps that the kernel accepts only with a description of their elements (kernel documentation, bpf/btf.rst):
those whose elements begin with a struct bpf_spin_lock, and those whose elements belong to sockets.
"""

from __future__ import annotations

import os
import struct

from udpwatch.agent.kernel.bpf import MapDefinition, btf_load, map_create

_INT, _STRUCT = 1, 4  # BTF_KIND_*
_U32, _LOCK, _ELEMENT = 1, 2, 3  # the numbers of the types, in the order in which they are written
_STRINGS = b"\0u32\0bpf_spin_lock\0val\0element\0lock\0"


def describe(element_bytes: int, is_locked: bool = True) -> bytes:
    """Return BTF of a key (a 32-bit number) and of an element, which begins with a lock if ``is_locked``. Other members
    are left out: the kernel does not need them.
    """

    def name(text: str) -> int:
        return _STRINGS.index(f"\0{text}\0".encode()) + 1

    types = struct.pack("=IIII", name("u32"), _INT << 24, 4, 32)
    types += struct.pack("=III III", name("bpf_spin_lock"), _STRUCT << 24 | 1, 4, name("val"), _U32, 0)
    types += struct.pack("=III", name("element"), _STRUCT << 24 | int(is_locked), element_bytes)
    types += struct.pack("=III", name("lock"), _LOCK, 0) if is_locked else b""
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(_STRINGS))
    return header + types + _STRINGS


def create(definition: MapDefinition, is_locked: bool) -> int:
    """Create an array whose elements begin with a lock, or a map whose elements belong to sockets; return its
    descriptor.
    """
    btf = btf_load(describe(definition.value_bytes, is_locked))
    try:
        return map_create(definition, btf, _U32, _ELEMENT)
    finally:
        os.close(btf)
