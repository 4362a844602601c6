"""What the tests with hypothesis share: how long they look, and values that nobody expects.

`UDPWATCH_FUZZ=1` (`make fuzz`) looks twenty times as long.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = os.environ.get("UDPWATCH_FUZZ", "") not in ("", "0")


def rounds(number: int) -> settings:
    """Return the settings for a test with so many examples."""
    return settings(max_examples=number * (20 if LONG else 1), deadline=None, suppress_health_check=list(HealthCheck))


#: text that moves the cursor, changes colours or the title, reverses text, begins markup, or is not valid UTF-8
HOSTILE = ("\x1b[2J", "\x1b]0;x\x07", "\x9b1m", "\r", "\n", "\x08", "\x7f", "\u202e", "\u2028", "[red]", "%s", "{port}")
HOSTILE += ("\udcff", "\0", "\U000e0041", "'", '"', "\\", "", " ", "\U0001d518", "e\u0301")
texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20), st.lists(st.sampled_from(HOSTILE)).map("".join))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 1 << 31, 1 << 63, 1 << 64, 10**400]),
    st.floats(),
    texts,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, known: list[Any], replacement: st.SearchStrategy[Any] = values) -> Any:
    """Return one of these JSON values with some of its parts replaced, removed or added."""
    root = [copy.deepcopy(draw(st.sampled_from(known)))]
    for _ in range(draw(st.integers(0, 3))):
        parent: Any = root
        at: Any = 0
        for _ in range(draw(st.integers(0, 4))):
            inner = parent[at]
            if not isinstance(inner, dict | list) or not inner:
                break
            parent = inner
            at = draw(st.sampled_from(list(inner) if isinstance(inner, dict) else list(range(len(inner)))))
        if parent is not root and draw(st.booleans()):
            del parent[at]
        elif isinstance(parent, dict) and draw(st.integers(0, 3)) == 0:
            parent[draw(texts)] = draw(replacement)
        else:
            parent[at] = draw(replacement)
    return root[0]


def is_safe(text: str) -> bool:
    """Whether text of several lines moves no cursor and changes no style on a terminal. Code has tabs."""
    return all(line.replace("\t", "").isprintable() for line in text.split("\n"))
