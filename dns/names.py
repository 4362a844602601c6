"""Domain names and IP addresses as bytes: text, wire format, and the reverse names of addresses."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

MAX_NAME_BYTES = 255  # RFC 1035, section 2.3.4
MAX_LABEL_BYTES = 63
MAX_ADDRESSES = 500  # per local name and family: they fit into one message over TCP and into client limits

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LOWER = bytes.maketrans(bytes(range(65, 91)), bytes(range(97, 123)))
_CASE_BITS = bytes(0x20 * (65 <= octet & 0xDF <= 90) for octet in range(256))  # the bit that is a letter's case
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}
REVERSE_4 = b"\x07in-addr\x04arpa\x00"
REVERSE_6 = b"\x03ip6\x04arpa\x00"
_HEX = b"0123456789abcdef"


def lower(name: bytes) -> bytes:
    """Convert a name in wire format to lower case. Length octets are below 64, so they do not change."""
    return name.translate(_LOWER)


def mix_case(name: bytes, random: bytes) -> bytes:
    """Change the case of letters of a name in wire format by one random octet each (0x20 encoding)."""
    size = len(name)
    changes = int.from_bytes(random, "big") & int.from_bytes(name.translate(_CASE_BITS), "big")
    return (int.from_bytes(name, "big") ^ changes).to_bytes(size, "big")


def name_from_text(text: str) -> bytes:
    r"""Convert a name in zone-file notation (``\.`` and ``\DDD``, RFC 1035, section 5.1) to wire format.

    A final dot is optional. Characters outside ASCII become UTF-8. Raises ValueError with the problem.
    """
    if text in (".", ""):
        return b"\0"
    labels, label, raw, at = [], bytearray(), text.encode(), 0
    while at < len(raw):
        octet = raw[at]
        at += 1
        if octet == 0x5C:  # backslash
            digits = raw[at : at + 3]
            if len(digits) == 3 and digits.isdigit() and int(digits) < 256:
                label.append(int(digits))
                at += 3
            elif at < len(raw) and not raw[at : at + 1].isdigit():
                label.append(raw[at])
                at += 1
            else:
                raise ValueError("a backslash that escapes nothing")
        elif octet == 0x2E:
            labels.append(bytes(label))
            label.clear()
        else:
            label.append(octet)
    if label:
        labels.append(bytes(label))
    if any(not part for part in labels):
        raise ValueError("an empty label")
    if any(len(part) > MAX_LABEL_BYTES for part in labels):
        raise ValueError(f"a label of more than {MAX_LABEL_BYTES} octets")
    name = b"".join(bytes([len(part)]) + part for part in labels) + b"\0"
    if len(name) > MAX_NAME_BYTES:
        raise ValueError(f"more than {MAX_NAME_BYTES} octets")
    return name


def name_to_text(name: bytes) -> str:
    r"""Convert a name to text, without the final dot. Dots in labels, backslashes and octets that are not printable
    ASCII are escaped, so that a name stays on its line in a log."""
    labels = []
    at = 0
    while name[at]:
        label = name[at + 1 : at + 1 + name[at]]
        labels.append("".join(_printable(octet) for octet in label))
        at += 1 + name[at]
    return ".".join(labels) or "."


def _printable(octet: int) -> str:
    if octet in (0x2E, 0x5C):
        return f"\\{chr(octet)}"
    return chr(octet) if 0x21 <= octet <= 0x7E else f"\\{octet:03d}"


def suffixes(name: bytes) -> Iterator[bytes]:
    """Yield the name, then each name above it, up to the root."""
    at = 0
    while name[at]:
        yield name[at:]
        at += 1 + name[at]
    yield name[at:]


def is_subdomain(name: bytes, domain: bytes) -> bool:
    """Return whether a name is the domain or below it; both in lower case."""
    return name.endswith(domain) and any(part == domain for part in suffixes(name))


def is_single_label(name: bytes) -> bool:
    """Return whether a name has one label, or is the root."""
    return not name[0] or not name[1 + name[0]]


def label_count(name: bytes) -> int:
    """Return the number of labels, without the root."""
    return sum(1 for _ in suffixes(name)) - 1


# ---- addresses ----


def pack_address(text: str) -> bytes:
    """Convert a numeric address to 4 or 16 octets. Raises OSError."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def unpack_address(packed: bytes) -> str:
    """Convert 4 or 16 octets to a numeric address."""
    return socket.inet_ntop(_FAMILY[len(packed)], packed)


def address_of(name: bytes) -> bytes | None:
    """Return the address of a complete reverse name (RFC 1035, section 3.5; RFC 3596, section 2.5), or None."""
    labels = name_to_text(name).split(".")
    if name.endswith(REVERSE_4) and len(labels) == 6 and labels[4] == "in-addr":
        try:
            return bytes(_octet(label) for label in reversed(labels[:4]))
        except ValueError:
            return None
    if name.endswith(REVERSE_6) and len(labels) == 34 and labels[32] == "ip6":
        digits = "".join(reversed(labels[:32]))
        if len(digits) == 32 and all(digit in _HEX.decode() for digit in digits):
            return bytes.fromhex(digits)
    return None


def _octet(label: str) -> int:
    if not label.isdecimal() or not label.isascii() or (label[0] == "0" and len(label) > 1):
        raise ValueError(label)
    return int(label)  # above 255: bytes() raises ValueError
