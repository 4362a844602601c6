"""Requests of many protocols, each one datagram that a server replies to."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable

SECRET = b"testing123"  # of RADIUS


def request_named(name: str) -> bytes:
    """Return a new request of a protocol; an unknown name is the request itself."""
    return _REQUESTS[name]() if name in _REQUESTS else name.encode()


def _dns() -> bytes:
    return _number() + bytes.fromhex("0100 0001 0000 0000 0000") + b"\x07example\x04test\x00" + b"\0\1\0\1"


def _iodine() -> bytes:
    """A handshake for the version, as a NULL query."""
    return _number() + bytes.fromhex("0100 0001 0000 0000 0000") + b"\x08vaaaakae\x03tun\x04test\x00" + b"\0\x0a\0\1"


def _ntp() -> bytes:
    return b"\x23" + bytes(39) + os.urandom(8)


def _stun() -> bytes:
    return bytes.fromhex("0001 0000 2112a442") + os.urandom(12)


def _sip() -> bytes:
    call = os.urandom(6).hex()
    return (
        "OPTIONS sip:test@example.test SIP/2.0\r\n"
        f"Via: SIP/2.0/UDP 172.17.0.3:5060;rport;branch=z9hG4bK{call}\r\n"
        f"Max-Forwards: 70\r\nFrom: <sip:a@example.test>;tag={call}\r\nTo: <sip:test@example.test>\r\n"
        f"Call-ID: {call}\r\nCSeq: 1 OPTIONS\r\nContact: <sip:a@172.17.0.3>\r\nContent-Length: 0\r\n\r\n"
    ).encode()


def _sip_invite() -> bytes:
    return _sip().replace(b"OPTIONS", b"INVITE")


def _radius_status() -> bytes:
    """Status-Server with a Message-Authenticator (RFC 5997)."""
    head = struct.pack("!BBH", 12, os.urandom(1)[0], 38) + os.urandom(16)
    return head + b"\x50\x12" + hmac.new(SECRET, head + b"\x50\x12" + bytes(16), hashlib.md5).digest()


def _l2tp() -> bytes:
    """Start-Control-Connection-Request (RFC 2661)."""
    attributes = (
        bytes.fromhex("8008 0000 0000 0001")  # message type SCCRQ
        + bytes.fromhex("8008 0000 0002 0100")  # protocol version
        + bytes.fromhex("800a 0000 0003 00000003")  # framing capabilities
        + bytes.fromhex("8009 0000 0007")
        + b"lac"  # host name
        + bytes.fromhex("8008 0000 0009")
        + _number()  # assigned tunnel
        + bytes.fromhex("8008 0000 000a 0004")  # receive window
    )
    return struct.pack("!HHHHHH", 0xC802, 12 + len(attributes), 0, 0, 0, 0) + attributes


def _ike() -> bytes:
    """An IKE_SA_INIT with a proposal that no server takes."""
    proposal = bytes.fromhex("00000010 01010001 00000008 0100 0001")  # encryption DES-IV64
    payload = struct.pack("!BBH", 40, 0, 4 + len(proposal)) + proposal
    nonce = struct.pack("!BBH", 0, 0, 36) + os.urandom(32)
    length = 28 + len(payload) + len(nonce)
    return os.urandom(8) + bytes(8) + struct.pack("!BBBBII", 33, 0x20, 34, 8, 0, length) + payload + nonce


def _openvpn() -> bytes:
    """P_CONTROL_HARD_RESET_CLIENT_V2."""
    return b"\x38" + os.urandom(8) + b"\0" + bytes(4)


def _dtls() -> bytes:
    """A ClientHello of DTLS 1.2."""
    ciphers = bytes.fromhex("c02b c02f c02c c030 009e 009c 002f 0035")
    extensions = (
        bytes.fromhex("000a 0006 0004 0017 0018")  # groups
        + bytes.fromhex("000b 0002 0100")  # point formats
        + bytes.fromhex("000d 0010 000e 0401 0501 0601 0403 0503 0603 0804")  # signature algorithms
        + bytes.fromhex("ff01 0001 00")
        + bytes.fromhex("0017 0000")
    )
    hello = b"\xfe\xfd" + os.urandom(32) + b"\0\0" + struct.pack("!H", len(ciphers)) + ciphers + b"\1\0"
    hello += struct.pack("!H", len(extensions)) + extensions
    length = len(hello).to_bytes(3, "big")
    handshake = b"\1" + length + bytes(5) + length + hello
    return b"\x16\xfe\xff" + bytes(8) + struct.pack("!H", len(handshake)) + handshake


def _quic() -> bytes:
    """A packet of a version that no server has: the reply is a Version Negotiation."""
    return (b"\xc0\x1a\x2a\x3a\x4a\x08" + os.urandom(8) + b"\x08" + os.urandom(8)).ljust(1300, b"\0")


def _tracker() -> bytes:
    return bytes.fromhex("0000041727101980 00000000") + os.urandom(4)


def _dht() -> bytes:
    return b"d1:ad2:id20:" + os.urandom(20) + b"e1:q4:ping1:t2:aa1:y1:qe"


def _snmp() -> bytes:
    name = bytes.fromhex("2b06010201010100")  # sysDescr.0
    binding = _tlv(0x30, _tlv(0x30, _tlv(6, name) + b"\5\0"))
    pdu = _tlv(0xA0, _tlv(2, b"\1" + os.urandom(2)) + _tlv(2, b"\0") + _tlv(2, b"\0") + binding)
    return _tlv(0x30, _tlv(2, b"\1") + _tlv(4, b"public") + pdu)


def _snmp_inform() -> bytes:
    uptime = _tlv(0x30, _tlv(6, bytes.fromhex("2b06010201010300")) + _tlv(0x43, b"\1"))
    trap = _tlv(0x30, _tlv(6, bytes.fromhex("2b060106030101040100")) + _tlv(6, bytes.fromhex("2b0601060301010501")))
    pdu = _tlv(0xA6, _tlv(2, b"\1" + os.urandom(2)) + _tlv(2, b"\0") + _tlv(2, b"\0") + _tlv(0x30, uptime + trap))
    return _tlv(0x30, _tlv(2, b"\1") + _tlv(4, b"public") + pdu)


def _tftp() -> bytes:
    return b"\0\1none\0octet\0"


def _rpc(program: int, version: int) -> Callable[[], bytes]:
    """Procedure 0 of a program of ONC RPC."""
    return lambda: os.urandom(4) + struct.pack("!IIIII", 0, 2, program, version, 0) + bytes(16)


def _memcached() -> bytes:
    return _number() + bytes.fromhex("0000 0001 0000") + b"version\r\n"


def _coap() -> bytes:
    """An empty confirmable message: the reply is a Reset."""
    return b"\x40\0" + _number()


def _mumble() -> bytes:
    return bytes(4) + os.urandom(8)


def _teeworlds() -> bytes:
    """A request for a token of version 0.7."""
    return b"\x04\0\0\xff\xff\xff\xff\x05" + os.urandom(4) + bytes(508)


def _minetest() -> bytes:
    """A reliable, empty packet of a new peer."""
    return bytes.fromhex("4f457403 0000 00 03 ffdc 01")


def _srt() -> bytes:
    """The induction of a handshake."""
    return (
        struct.pack("!IIII", 0x80000000, 0, 0, 0)
        + struct.pack("!IIIIIiII", 4, 2, 1000, 1500, 8192, 1, 77, 0)
        + bytes(16)
    )


def _sockperf() -> bytes:
    return struct.pack("!QHI", 1, 3, 14)


def _kerberos() -> bytes:
    """An AS-REQ for a principal that is not there."""
    name = _tlv(0x30, _tlv(0xA0, _tlv(2, b"\1")) + _tlv(0xA1, _tlv(0x30, _tlv(0x1B, b"nobody"))))
    server = _tlv(
        0x30, _tlv(0xA0, _tlv(2, b"\2")) + _tlv(0xA1, _tlv(0x30, _tlv(0x1B, b"krbtgt") + _tlv(0x1B, b"EXAMPLE.TEST")))
    )
    body = _tlv(
        0x30,
        _tlv(0xA0, _tlv(3, bytes(5)))
        + _tlv(0xA1, name)
        + _tlv(0xA2, _tlv(0x1B, b"EXAMPLE.TEST"))
        + _tlv(0xA3, server)
        + _tlv(0xA5, _tlv(0x18, b"20370101000000Z"))
        + _tlv(0xA7, _tlv(2, b"\1" + os.urandom(3)))
        + _tlv(0xA8, _tlv(0x30, _tlv(2, b"\x12"))),
    )
    return _tlv(0x6A, _tlv(0x30, _tlv(0xA1, _tlv(2, b"\5")) + _tlv(0xA2, _tlv(2, b"\x0a")) + _tlv(0xA4, body)))


def _netbios() -> bytes:
    """A node status request."""
    return _number() + bytes.fromhex("0000 0001 0000 0000 0000 20") + b"CK" + b"A" * 30 + b"\0\0\x21\0\1"


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    return bytes([tag]) + (bytes([size]) if size < 128 else b"\x82" + struct.pack("!H", size)) + content


def _number() -> bytes:
    return os.urandom(2)


_REQUESTS: dict[str, Callable[[], bytes]] = {
    "coap": _coap,
    "dht": _dht,
    "dns": _dns,
    "dtls": _dtls,
    "ike": _ike,
    "iodine": _iodine,
    "kerberos": _kerberos,
    "l2tp": _l2tp,
    "memcached": _memcached,
    "minetest": _minetest,
    "mumble": _mumble,
    "netbios": _netbios,
    "ntp": _ntp,
    "openvpn": _openvpn,
    "quic": _quic,
    "radius": _radius_status,
    "rpcbind": _rpc(100000, 3),
    "sip": _sip,
    "sip-invite": _sip_invite,
    "snmp": _snmp,
    "snmp-inform": _snmp_inform,
    "sockperf": _sockperf,
    "srt": _srt,
    "statd": _rpc(100024, 1),
    "stun": _stun,
    "teeworlds": _teeworlds,
    "tftp": _tftp,
    "tracker": _tracker,
}
