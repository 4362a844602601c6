"""The parser of bpf/packet.h on its own: it runs in the kernel (BPF_PROG_TEST_RUN) and notes what it finds.

`kernel_parser.py MEMORY` compiles parser.c in a process of its own, as the loader does, and prints the object. MEMORY
is 0 for a kernel whose memory the programs may not read: the compiler gets other code for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from restricted import unlimited

from udpwatch.agent.kernel import bpf, loader, objects
from udpwatch.agent.kernel.bpf import AttachType, ProgramType

BATCH = 4096  # RESULTS in parser.c
_RESULT = struct.Struct("=16s16sHHIBBB5x")
_ETHERNET = {4: bytes(12) + b"\x08\x00", 6: bytes(12) + b"\x86\xdd"}
_MAX_PACKET = 4096
# struct __sk_buff in include/uapi/linux/bpf.h
_SKB_BYTES, _DATA_END, _GSO_SEGS = 192, 80, 164

#: whether data + 1 <= data_end, as a cgroup_skb program sees it
_HAS_PACKET = bytes.fromhex(
    "61124c0000000000"  # r2 = skb->data
    "6113500000000000"  # r3 = skb->data_end
    "0702000001000000"  # r2 += 1
    "b700000000000000"  # r0 = 0
    "2d32010000000000"  # if r2 > r3 goto +1
    "b700000001000000"  # r0 = 1
    "9500000000000000"
)


def gives_a_packet() -> bool:
    """Whether BPF_PROG_TEST_RUN gives cgroup_skb programs the packet; older kernels give it only on the hook."""
    with unlimited():
        program = bpf.program_load(ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS, _HAS_PACKET)
    try:
        return bpf.program_test_run(program, bytes(64), 1)[0] == 1
    finally:
        os.close(program)


@dataclass(frozen=True, slots=True)
class Feed:
    """A packet for the parser, without an Ethernet header."""

    packet: bytes
    segments: int = 0  # of a GSO packet (skb->gso_segs)
    linear: int = 0  # so many bytes are linear, the others in pages; 0: all of them


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the parser found; addresses as IPv6, IPv4 ones mapped."""

    is_udp: bool
    unparsed: int  # times that it counted the packet as one that it cannot parse
    source: bytes = b""
    source_port: int = 0
    destination: bytes = b""
    destination_port: int = 0
    segments: int = 0


class KernelParser:
    """The loaded program; a context manager."""

    def __init__(self, reads_memory: bool) -> None:
        here = Path(__file__)
        command = [sys.executable, "-P", here, str(int(reads_memory))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), *filter(None, sys.path)])}
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        compiled = objects.decode("", done.stdout)
        with unlimited():
            self._maps = {each.name: bpf.map_create(each) for each in compiled.maps}
            numbers = dict(enumerate(self._maps.values()))
            code = objects.name_maps(compiled.programs["parse_one"], numbers)
            self._program, self.instructions = bpf.program_load_logged(
                ProgramType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS, code, "parse_one"
            )
        self._frame = ctypes.create_string_buffer(14 + _MAX_PACKET)
        self._skb = ctypes.create_string_buffer(_SKB_BYTES)
        self._attribute = ctypes.create_string_buffer(128)
        #: whether this kernel makes packets with pages (since Linux 6.19)
        self.makes_pages = self._run(Feed(bytes([0x45]) + bytes(99), linear=50))

    def parse(self, feeds: Sequence[Feed]) -> Iterator[Parsed | None]:
        """Run the parser on BATCH packets at most; None for a packet that the kernel does not begin with."""
        bpf.map_update(self._maps["cursor"], bytes(4), bytes(8))
        ran = [self._run(feed) for feed in feeds]
        found = _RESULT.iter_unpack(b"".join(bpf.array_values(self._maps["results"], _RESULT.size)))
        for did_run in ran:
            if not did_run:
                yield None
                continue
            source, destination, source_port, destination_port, segments, is_udp, _family, unparsed = next(found)
            if is_udp:
                yield Parsed(True, unparsed, source, source_port, destination, destination_port, segments)
            else:
                yield Parsed(False, unparsed)

    def _run(self, feed: Feed) -> bool:
        """Run the program; return whether the kernel began with the packet."""
        frame = _ETHERNET.get(feed.packet[0] >> 4 if feed.packet else 0, _ETHERNET[4]) + feed.packet
        ctypes.memmove(self._frame, frame, len(frame))
        struct.pack_into("=I", self._skb, _GSO_SEGS, feed.segments)
        struct.pack_into("=I", self._skb, _DATA_END, 14 + feed.linear if feed.linear else 0)
        struct.pack_into(
            "=IIIIQQIIIIQQ",
            self._attribute,
            0,
            self._program,
            0,
            len(frame),
            0,
            ctypes.addressof(self._frame),
            0,
            1,
            0,
            _SKB_BYTES,
            0,
            ctypes.addressof(self._skb),
            0,
        )
        try:
            bpf.bpf(bpf.Command.PROG_TEST_RUN, self._attribute)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        assert struct.unpack_from("=I", self._attribute, 4)[0] == 1
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._program, *self._maps.values()):
            os.close(descriptor)


def _compile(reads_memory: bool) -> bytes:
    from udpwatch.agent.kernel import features, loader_child  # noqa: PLC0415 only here: it imports bcc

    request = {"limits": asdict(loader.Limits()), "forwarded": False, "heal": False, "hooks": "all"}
    constants = loader_child._constants(request, features.probe(features.VMLINUX_BTF))
    if not reads_memory:
        constants["HAVE_KERNEL_READ"] = 0
    return objects.encode("", loader_child._compile(str(Path(__file__).with_name("parser.c")), constants))


if __name__ == "__main__":
    sys.stdout.buffer.write(_compile(sys.argv[1] == "1"))
