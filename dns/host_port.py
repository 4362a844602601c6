"""The address that an HTTP server listens on, as text."""

from __future__ import annotations


def host_port(text: str) -> tuple[str, int]:
    """Return the two parts of HOST:PORT, or of [HOST]:PORT; raises ValueError."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) > 65_535:
        raise ValueError(text)
    return host, int(port)
