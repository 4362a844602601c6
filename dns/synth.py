"""Names that are computed from addresses, and back: `--synth-domain`.

A name is one label in a domain: a prefix and either the number of the address in its range (``host-7``) or the address
with dashes (``host-192-0-2-7``).
"""

from __future__ import annotations

import re

from udpwatch.dns.names import name_from_text, pack_address, unpack_address
from udpwatch.dns.settings import SynthDomain

_MAPPED = b"--ffff-"  # of an IPv4-mapped address, which has colons and dots
_ALLOWED = {4: re.compile(rb"[0-9-]+"), 16: re.compile(rb"[0-9a-f-]+")}


class SynthDomains:
    """All `--synth-domain` options; of two that apply, the later one counts."""

    def __init__(self, domains: tuple[SynthDomain, ...]) -> None:
        self._domains = domains[::-1]
        self._by_domain: dict[bytes, list[SynthDomain]] = {}
        for each in self._domains:
            self._by_domain.setdefault(each.domain, []).append(each)

    def addresses(self, name: bytes) -> list[bytes]:
        """Return the addresses of a name (wire format, lower case), at most one of each family."""
        found: dict[int, bytes] = {}
        label = name[1 : 1 + name[0]]
        for each in self._by_domain.get(name[1 + name[0] :], ()):
            address = _address(each, label)
            if address is not None:
                found.setdefault(len(address), address)
        return list(found.values())

    def pointer(self, address: bytes) -> bytes | None:
        """Return the name of an address."""
        for each in self._domains:
            if _holds(each, address):
                return name_from_text(_label(each, address))[:-1] + each.domain
        return None


def _holds(domain: SynthDomain, address: bytes) -> bool:
    return len(address) == len(domain.first) and domain.first <= address <= domain.last


def _address(domain: SynthDomain, label: bytes) -> bytes | None:
    """Return the address of a label in this domain, or None."""
    prefix, size = domain.prefix.encode(), len(domain.first)
    if not label.startswith(prefix):
        return None
    tail = label[len(prefix) :]
    if domain.is_numbered:
        if not tail.isdigit():
            return None
        number = int.from_bytes(domain.first, "big") + int(tail)
        return number.to_bytes(size, "big") if number <= int.from_bytes(domain.last, "big") else None
    if not _ALLOWED[size].fullmatch(tail):
        return None
    text = tail.decode()
    if size == 16 and tail.startswith(_MAPPED):
        text = "::ffff:" + text[len(_MAPPED) :].replace("-", ".")
    else:
        text = text.replace("-", "." if size == 4 else ":")
    try:
        address = pack_address(text)
    except OSError:
        return None
    return address if _holds(domain, address) else None


def _label(domain: SynthDomain, address: bytes) -> str:
    """Return the label of an address."""
    if domain.is_numbered:
        return f"{domain.prefix}{int.from_bytes(address, 'big') - int.from_bytes(domain.first, 'big')}"
    text = unpack_address(address).replace(".", "-").replace(":", "-")
    if not domain.prefix and text.startswith("-"):  # a label does not start with a dash
        text = "0" + text
    return domain.prefix + text
