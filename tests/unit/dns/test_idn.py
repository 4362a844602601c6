"""International names, beside libidn2, which dnsmasq uses."""

from __future__ import annotations

import ctypes
import functools

import pytest

from udpwatch.dns.idn import MAX_TEXT, to_ascii

IDN2_NONTRANSITIONAL = 8


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libidn2.so.0")
    except OSError:
        return None


def libidn2(text: str) -> str | None:
    """idn2_to_ascii_8z() as dnsmasq calls it; None for a name that it rejects."""
    library, output = _library(), ctypes.c_char_p()
    if not library:
        pytest.skip("libidn2 is missing: apt-get install dnsmasq-base")
    if library.idn2_to_ascii_8z(text.encode(), ctypes.byref(output), IDN2_NONTRANSITIONAL):
        return None
    assert output.value is not None
    return output.value.decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),  # composed
        ("straße.example", "xn--strae-oqa.example"),  # not "strasse": non-transitional
        ("日本語。例え", "xn--wgv71a119e.xn--r8jz45g"),
        ("\uff21\uff22\uff23.ü", "abc.xn--tda"),
        ("\u03c2.example", "xn--3xa.example"),
        ("_sip._udp.ü", "_sip._udp.xn--tda"),
        ("b_ücher.example", "xn--b_cher-4ya.example"),
        ("a\u00adü", "xn--a-eha"),  # a soft hyphen is ignored
        ("a.ü.c.", "a.xn--tda.c."),
        ("אבג.example", "xn--4dbcd.example"),
        ("क्\u200dष", "xn--11b2ezcw70k"),  # a joiner in its context
    ],
)
def test_converted_as_by_libidn2(text: str, expected: str) -> None:
    assert to_ascii(text) == expected
    assert libidn2(text) == expected


@pytest.mark.parametrize(
    "text",
    ["☕.example", "i♥ny.com", "ab--ü", "-ü", "ü-", "\u200dü", "אa", "ü" * 64, "\u0300ü", "ü/x", "ü*", "ü\\.x", "½.ü"],
)
def test_rejected_as_by_libidn2(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        to_ascii(text)
    assert libidn2(text) is None


def test_ascii_stays_as_it_is() -> None:
    assert to_ascii("A_b.-x.Example") == "A_b.-x.Example"


def test_long_text_is_not_converted() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_TEXT} characters"):
        to_ascii("ü." * MAX_TEXT)
