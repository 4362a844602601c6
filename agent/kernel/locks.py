"""Maps whose elements begin with a struct bpf_spin_lock: the kernel must be told so by BTF (kernel documentation,
bpf/btf.rst), and takes the lock's helpers for no other map.
"""

from __future__ import annotations

import os
import struct

from udpwatch.agent.kernel.bpf import MapDefinition, btf_load, map_create

_INT, _STRUCT = 1, 4  # BTF_KIND_*
_U32, _LOCK, _ELEMENT = 1, 2, 3  # the types' numbers, in the order they are written
_STRINGS = b"\0u32\0bpf_spin_lock\0val\0element\0lock\0"


def describe(element_bytes: int) -> bytes:
    """BTF of an array's key (a number of 32 bits) and of an element that begins with a lock; its other members, of
    which the kernel need not know, are left out.
    """

    def name(text: str) -> int:
        return _STRINGS.index(f"\0{text}\0".encode()) + 1

    types = struct.pack("=IIII", name("u32"), _INT << 24, 4, 32)
    types += struct.pack("=III III", name("bpf_spin_lock"), _STRUCT << 24 | 1, 4, name("val"), _U32, 0)
    types += struct.pack("=III III", name("element"), _STRUCT << 24 | 1, element_bytes, name("lock"), _LOCK, 0)
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(_STRINGS))
    return header + types + _STRINGS


def create(definition: MapDefinition) -> int:
    """Create an array whose elements begin with a lock; returns its descriptor."""
    btf = btf_load(describe(definition.value_bytes))
    try:
        return map_create(definition, btf, _U32, _ELEMENT)
    finally:
        os.close(btf)
