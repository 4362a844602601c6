"""A TCP connection without a kernel: real asyncio streams over a transport whose peer the test plays."""

from __future__ import annotations

import asyncio
import struct
from typing import Any


class TcpDouble(asyncio.Transport):
    """The server's end. The peer takes ``window`` octets, and more when the test calls `take`."""

    def __init__(self, client: str, port: int = 4000, window: int = 1 << 30) -> None:
        super().__init__({"peername": (client, port)})
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(limit=4096, loop=loop)
        self._protocol = asyncio.StreamReaderProtocol(self.reader, loop=loop)
        self.writer = asyncio.StreamWriter(self, self._protocol, self.reader, loop)
        self._protocol.connection_made(self)
        self.window = window
        self.taken, self.buffer = bytearray(), bytearray()
        self.closing = self.aborted = self.paused = False
        self._high = 65_536

    # ---- the peer ----

    def send(self, *queries: bytes) -> None:
        """Queries arrive, each with its length."""
        self.send_raw(b"".join(struct.pack("!H", len(query)) + query for query in queries))

    def send_raw(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def end(self) -> None:
        """The peer sends no more (half-close)."""
        self._protocol.eof_received()

    def take(self, octets: int) -> None:
        """The peer reads so much more."""
        self.window += octets
        self._flush()

    def responses(self) -> list[bytes]:
        """Whole responses that the peer has taken."""
        found, at = [], 0
        while at + 2 <= len(self.taken):
            size = int.from_bytes(self.taken[at : at + 2], "big")
            found.append(bytes(self.taken[at + 2 : at + 2 + size]))
            at += 2 + size
        return found

    # ---- asyncio.Transport ----

    def write(self, data: Any) -> None:
        assert not self.closing, "written after close"
        self.buffer += data
        self._flush()

    def _flush(self) -> None:
        room = max(self.window - len(self.taken), 0)
        self.taken += self.buffer[:room]
        del self.buffer[:room]
        if len(self.buffer) > self._high and not self.paused:
            self.paused = True
            self._protocol.pause_writing()
        elif not self.buffer and self.paused:
            self.paused = False
            self._protocol.resume_writing()
        if self.closing and not self.buffer:
            self._lose()

    def _lose(self) -> None:
        protocol, self._protocol = self._protocol, None  # type: ignore[assignment]
        if protocol:
            asyncio.get_running_loop().call_soon(protocol.connection_lost, None)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 65_536 if high is None else high

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True
        if not self.buffer:
            self._lose()

    def abort(self) -> None:
        self.closing = self.aborted = True
        self.buffer.clear()
        self._lose()

    def pause_reading(self) -> None:
        self.reading_paused = True

    def resume_reading(self) -> None:
        self.reading_paused = False
