"""Settings of any value and type: they are accepted, or refused by name."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import rounds, scalars, texts, values
from hypothesis import example, given
from hypothesis import strategies as st

from udpwatch.agent.config import SETTINGS, Settings, resolve
from udpwatch.agent.errors import UsageError

NAMES = [setting.name for setting in SETTINGS]
#: what settings accept, and almost accept
WORDS = ("on", "off", "true", "1", "0", "30", "1e3", "inf", "nan", "-1", "53,161", "all", "standby", "auto", "cgroup")
WORDS += ("127.0.0.1:9953", "[::1]:9953", ":0", "::1:1", "a:99999", "/dev/null", "/", "-", "dns-*,snmpd", "9" * 5000)
WORDS += ("\u0663", "\udcff")
words = st.one_of(st.sampled_from(WORDS), texts)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("settings")
    yield folder / "settings.toml"
    (folder / "settings.toml").unlink(missing_ok=True)


def refused(flags: dict[str, Any], environment: dict[str, str], file: Path | None) -> str:
    """Return the message of the error; "": the settings are accepted."""
    try:
        settings = resolve(flags, environment, file)
    except UsageError as error:
        assert str(error).isprintable()
        return str(error)
    assert isinstance(settings, Settings)
    assert math.isfinite(settings.window) and isinstance(settings.max_peers, int)
    assert settings.healing is None or str(settings.healing)
    return ""


@rounds(400)
@given(name=st.sampled_from(NAMES), value=words)
def test_flag_or_variable_is_accepted_or_refused_by_name(name: str, value: str) -> None:
    for flags, environment, key in (
        ({name: value}, {}, f"--{name.replace('_', '-')}"),
        ({}, {f"UDPWATCH_{name.upper()}": value}, f"UDPWATCH_{name.upper()}"),
    ):
        message = refused(flags, environment, None)
        assert not message or key in message or "--heal-dry-run needs" in message


def toml(value: Any) -> str:
    """Write a value as TOML; raises ValueError for one that TOML does not have."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return hex(value) if value >= 0 else str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        value.encode()
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(name)} = {toml(each)}' for name, each in value.items())}}}"
    raise ValueError


@rounds(400)
@given(name=st.sampled_from(NAMES), value=st.one_of(values, scalars, words))
@example(name="dns", value=[])
@example(name="window", value=10**400)
@example(name="max_peers", value=1 << 20_000)
@example(name="heal", value=[1 << 20_000])
@example(name="heal_process", value=["\x1b[2J"])
def test_value_in_the_file_is_accepted_or_refused_by_name(file: Path, name: str, value: Any) -> None:
    try:
        file.write_text(f"{name} = {toml(value)}\n", encoding="utf-8")
    except ValueError:
        return
    message = refused({}, {}, file)
    assert not message or name in message.replace("-", "_")


@rounds(200)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from(["window", "=", "[", "]", "{", "}", '"', "'", "\n", "1", ",", ".", "#", "dns"])).map(
            lambda parts: "".join(parts).encode()
        ),
    )
)
@example(content=b"max_peers = " + b"9" * 5000)
@example(content=b"window = " + b"[" * 100_000)
@example(content=b"window = " + b"{a=" * 10_000)
def test_any_file_is_accepted_or_refused_by_its_path(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    message = refused({}, {}, file)
    assert not message or str(file) in message


@rounds(200)
@given(
    window=st.floats(0.1, 3600),
    peers=st.integers(16, 1 << 22),
    ports=st.sets(st.integers(1, 65535), min_size=1, max_size=8),
    dns=st.booleans(),
    node=st.text(min_size=1).filter(lambda text: "\0" not in text),
)
def test_accepted_values_are_the_effective_ones_from_each_source(
    file: Path, window: float, peers: int, ports: set[int], dns: bool, node: str
) -> None:
    values = {"window": window, "max_peers": peers, "heal": sorted(ports), "dns": dns, "node": node}
    as_text = {
        "window": repr(window),
        "max_peers": str(peers),
        "heal": ",".join(map(str, sorted(ports))),
        "dns": "on" if dns else "off",
        "node": node,
    }
    sources: list[tuple[dict[str, Any], dict[str, str], Path | None]] = [
        (as_text, {}, None),
        ({}, {f"UDPWATCH_{name.upper()}": value for name, value in as_text.items()}, None),
    ]
    with contextlib.suppress(ValueError):
        file.write_text("".join(f"{name} = {toml(value)}\n" for name, value in values.items()), encoding="utf-8")
        sources.append(({}, {}, file))
    for flags, environment, path in sources:
        settings = resolve(flags, environment, path)
        found = settings.window, settings.max_peers, settings.dns, settings.node
        assert found == (window, peers, dns, node)
        assert settings.healing is not None and settings.healing.ports == ports
