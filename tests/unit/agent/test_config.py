"""Settings: precedence, and errors that name the key, the rejected value and the accepted ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from udpwatch.agent.config import SETTINGS, Address, Settings, resolve
from udpwatch.agent.errors import UsageError
from udpwatch.agent.model import HealSelection


def test_defaults_are_accepted() -> None:
    settings = resolve({}, {}, None)
    assert settings.metrics_listen == Address("127.0.0.1", 9953)
    assert settings.window == 30
    assert settings.socket == Path("/run/udpwatch/udpwatch.sock")
    assert settings.node


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('window = 1\nmax_peers = 100\nnode = "file"\n')
    settings = resolve({"window": "3"}, {"UDPWATCH_WINDOW": "2", "UDPWATCH_NODE": "variable"}, file)
    assert (settings.window, settings.max_peers, settings.node) == (3, 100, "variable")


def test_systemds_cache_folder_is_the_default() -> None:
    """The first folder of CacheDirectory= is used unless a setting names another."""
    systemd = {"CACHE_DIRECTORY": "/var/cache/a:/var/cache/b"}
    assert resolve({}, systemd, None).cache == Path("/var/cache/a")
    assert resolve({}, systemd | {"UDPWATCH_CACHE": "off"}, None).cache is None
    assert resolve({"cache": "/c"}, systemd, None).cache == Path("/c")
    assert resolve({}, {}, None).cache == Path("/var/cache/udpwatch")


def test_every_setting_has_a_field_and_the_reverse() -> None:
    assert {setting.name for setting in SETTINGS} == set(Settings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:9953", Address("0.0.0.0", 9953)),
        ("[::1]:0", Address("::1", 0)),
        ("node.example:1", Address("node.example", 1)),
        ("off", None),
    ],
)
def test_listen_address_is_parsed(text: str, address: Address | None) -> None:
    assert resolve({"metrics_listen": text}, {}, None).metrics_listen == address


@pytest.mark.parametrize("name", ["events", "socket", "cgroup", "node"])
def test_empty_texts_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"invalid value '' for --{name}: expected a non-empty text"):
        resolve({name: ""}, {}, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", "inf"),
        ("window", "-1"),
        ("window", "1e9"),
        ("max_peers", "1.5"),
        ("max_peers", "15"),
        ("max_series", "0"),
        ("events_per_second", "many"),
        ("metrics_listen", ":9953"),
        ("metrics_listen", "host:port"),
        ("btf", "/nowhere"),
        ("heal", "53,all"),
        ("heal", "0"),
        ("heal", "65536"),
        ("heal", "00000165535"),
        ("heal", ""),
        ("heal", "dns"),
        ("heal_process", "snmpd,,ntpd"),
        ("heal_dry_run", "maybe"),
    ],
)
def test_rejected_value_is_named_with_its_key(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({}, {f"UDPWATCH_{name.upper()}": value}, None)
    assert f"invalid value {value!r} for UDPWATCH_{name.upper()}: expected" in str(caught.value)


@pytest.mark.parametrize("line", ["window = true", "window = [1]", "max_peers = 1.5", "metrics_listen = 9953"])
def test_wrong_type_in_the_file_is_rejected(tmp_path: Path, line: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(line + "\n")
    with pytest.raises(UsageError, match="invalid value"):
        resolve({}, {}, file)


@pytest.mark.parametrize(
    ("line", "selection"),
    [
        ("", None),
        ("heal = []", None),
        ('heal = "off"', None),
        ('heal = false\nheal_process = "snmpd"', None),
        ('heal = "standby"', HealSelection()),
        ('heal = "all"', HealSelection(all_ports=True)),
        ("heal = [53, 161]", HealSelection(ports=frozenset({53, 161}))),
        ('heal = "53, 161"', HealSelection(ports=frozenset({53, 161}))),
        ('heal_process = ["snmpd", "dns-*"]', HealSelection(all_ports=True, processes=("snmpd", "dns-*"))),
        (
            'heal = 53\nheal_namespace = "kube-*"\nheal_dry_run = true',
            HealSelection(ports=frozenset({53}), namespaces=("kube-*",), dry_run=True),
        ),
    ],
)
def test_what_is_healed_is_narrowed_by_each_setting(tmp_path: Path, line: str, selection: HealSelection | None) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(line + "\n")
    assert resolve({}, {}, file).healing == selection


def test_dry_run_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="--heal-dry-run needs servers to heal"):
        resolve({"heal_dry_run": "on"}, {}, None)
