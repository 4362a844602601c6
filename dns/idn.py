"""International names: from the characters that people write to the ASCII form that clients ask for."""

from __future__ import annotations

MAX_TEXT = 1024  # characters; dnsmasq's limit


def to_ascii(text: str) -> str:
    """Convert a name to its ``xn--`` form: mapped by UTS 46 (non-transitional), checked by IDNA 2008, as in libidn2,
    which dnsmasq uses.

    ASCII labels stay as they are; other labels may have underscores. Raises ValueError with the problem.
    """
    if text.isascii():
        return text
    if len(text) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT} characters")
    import idna  # noqa: PLC0415  # its tables take 2 MB, and most hosts files need none

    labels = []
    try:
        for label in idna.uts46_remap(text, std3_rules=False, transitional=False).split("."):
            if label.isascii():
                labels.append(label)
            elif "_" in label:  # not in IDNA 2008, but in libidn2
                idna.check_label(label.replace("_", ""))
                labels.append("xn--" + label.encode("punycode").decode())
            else:
                labels.append(idna.alabel(label).decode())
    except UnicodeError as error:  # IDNAError is one
        raise ValueError(str(error)) from None
    return ".".join(labels)
