"""The settings. Flags override UDPWATCH_* environment variables, variables override the TOML file.

Every setting is one entry of SETTINGS, which names its flag, its variable and its key in the file.
"""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

from udpwatch.agent.errors import UsageError
from udpwatch.agent.model import Forwarded, HealSelection, Hooks, StateKeep
from udpwatch.dns.host_port import host_port

OFF = "off"


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT to listen on."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The validated settings of `udpwatch run`."""

    metrics_listen: Address | None
    events: str | None
    socket: Path | None
    cgroup: str | None
    btf: Path | None
    window: float  # seconds
    max_peers: int
    max_series: int
    max_servers: int
    events_per_second: int
    forget: float  # seconds
    node: str
    hooks: Hooks
    forwarded: Forwarded
    socket_group: str | None
    replay: Path | None
    dns: bool
    dns_conf: Path | None
    cache: Path | None
    state: Path | None
    state_keep: StateKeep
    heal: HealSelection | Literal[False] | None  # False: off; `healing` has what narrows it
    heal_process: tuple[str, ...] | None
    heal_namespace: tuple[str, ...] | None
    heal_dry_run: bool

    @property
    def healing(self) -> HealSelection | None:
        """Return whose replies are healed; None: healing is off."""
        processes, namespaces = self.heal_process or (), self.heal_namespace or ()
        ports = self.heal
        if ports is None and (processes or namespaces):
            ports = HealSelection(all_ports=True)
        if not ports:
            return None
        return replace(ports, processes=processes, namespaces=namespaces, dry_run=self.heal_dry_run)


class _Rejected(ValueError):
    """Holds what is expected."""


def _listen(value: object) -> Address | None:
    text = str(value)
    if text == OFF:
        return None
    try:
        return Address(*host_port(text))
    except ValueError:
        raise _Rejected("HOST:PORT, such as 127.0.0.1:9953 or [::1]:9953, or 'off'") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _Rejected("a non-empty text")
    return value


def _path_or_off(value: object) -> Path | None:
    text = _text(value)
    return None if text == OFF else Path(text)


def _file(value: object) -> Path:
    path = Path(_text(value))
    try:
        path.open("rb").close()
    except OSError as error:
        raise _Rejected(f"a readable file ({error.strerror})") from None
    return path


def _number(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise _Rejected(f"a number from {low:g} to {high:g}")
        return number

    return parse


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        try:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ValueError
            number = int(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise _Rejected(f"a whole number from {low} to {high}")
        return number

    return parse


_Choice = TypeVar("_Choice", bound=StrEnum)


def _choice(kind: type[_Choice]) -> Callable[[object], _Choice]:
    def parse(value: object) -> _Choice:
        # TOML's true and false, and the flags' --x and --no-x, are "on" and "off".
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        try:
            return kind(text)
        except ValueError:
            *others, last = kind
            raise _Rejected(f"{', '.join(others)} or {last}") from None

    return parse


def _switch(value: object) -> bool:
    # TOML's true and false, the flags' --x and --no-x, and a variable's text.
    words = {True: True, False: False, "on": True, "off": False}
    try:
        return words[value]
    except (KeyError, TypeError):  # a list or table of TOML
        raise _Rejected("on or off") from None


def _words(value: object) -> list[str]:
    """Return the words of "a,b" or of a TOML list."""
    listed = value if isinstance(value, list) else str(value).split(",") if isinstance(value, str | int) else []
    return [str(each).strip() for each in listed if not isinstance(each, bool)]


def _is_port(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 5 and 0 < int(word) < 65536


def _heal(value: object) -> HealSelection | Literal[False]:
    words = _words(value)
    if words == [OFF] or value is False or value == []:
        return False
    if words in (["all"], ["standby"]):
        return HealSelection(all_ports=words == ["all"])
    if not words or not all(map(_is_port, words)):
        raise _Rejected("'off', 'standby', 'all', or ports from 1 to 65535, such as 53,161")
    return HealSelection(ports=frozenset(map(int, words)))


def _names(value: object) -> tuple[str, ...]:
    words = _words(value)
    if not words or not all(words):
        raise _Rejected("names, such as snmpd,dns-*")
    return tuple(words)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its name, its parser and its help."""

    name: str
    parse: Callable[[object], Any]
    default: object  # goes through `parse` too; None: not set
    metavar: str  # "": a switch with the flags --x and --no-x
    help: str
    systemd: str = ""  # variable in which systemd gives a unit its own folders (systemd.exec(5)), instead of `default`

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "UDPWATCH_" + self.name.upper()


SETTINGS = (
    Setting(
        "metrics_listen",
        _listen,
        "127.0.0.1:9953",
        "HOST:PORT",
        "serve /metrics and health on this address; 'off'",
    ),
    Setting("events", _text, None, "FILE", "append each event as a JSON line to FILE; '-': standard output"),
    Setting("socket", _path_or_off, "/run/udpwatch/udpwatch.sock", "PATH", "the agent's Unix socket; 'off': no socket"),
    Setting("socket_group", _text, None, "GROUP", "group that may use the socket besides root: name or number"),
    Setting("cgroup", _text, None, "PATH", "watch only this cgroup v2 directory (default: the whole node)"),
    Setting("btf", _file, None, "PATH", "the kernel's type information (default: /sys/kernel/btf/vmlinux)"),
    Setting(
        "window", _number(0.1, 3600), 30, "SECONDS", "how long to remember a request; conntrack's UDP timeout is 30"
    ),
    Setting("max_peers", _integer(16, 1 << 22), 131_072, "N", "number of conversations to remember, 80 bytes each"),
    Setting(
        "max_series",
        _integer(1, 10_000),
        1_000,
        "N",
        "findings with series of their own; the excess is counted under 'other'",
    ),
    Setting(
        "max_servers",
        _integer(1, 2_000),
        500,
        "N",
        "UDP servers with series of their own; the excess is counted under 'other'",
    ),
    Setting("events_per_second", _integer(1, 100_000), 10, "N", "limit of events of one finding; counts stay exact"),
    Setting("forget", _number(1, 1e7), 3600, "SECONDS", "end a finding's series after this time without a wrong reply"),
    Setting(
        "hooks",
        _choice(Hooks),
        "all",
        "WHICH",
        "programs to attach: cgroup hooks, function probes, or all that the kernel allows",
    ),
    Setting(
        "forwarded",
        _choice(Forwarded),
        "auto",
        "",
        "check the replies of machines behind this node; auto: if function probes are allowed",
    ),
    Setting("dns", _switch, "off", "", "also run the DNS responder; it replies from the address that was asked"),
    Setting("dns_conf", _file, None, "FILE", "the responder's options, in dnsmasq's syntax (docs/dns-options.md)"),
    Setting(
        "heal",
        _heal,
        None,
        "PORTS",
        "set the right source of replies from these ports (53,161), or 'all'; 'standby': none until `udpwatch heal "
        "on`; 'off' (default)",
    ),
    Setting("heal_process", _names, None, "NAMES", "heal only servers of these processes; patterns: 'dns-*'"),
    Setting("heal_namespace", _names, None, "NAMES", "heal only servers in these Kubernetes namespaces; patterns"),
    Setting("heal_dry_run", _switch, "off", "", "heal nothing, and count what would be healed"),
    Setting("replay", _file, None, "FILE", "play a recording of --events instead of watching; needs no root"),
    Setting(
        "cache",
        _path_or_off,
        "/var/cache/udpwatch",
        "DIR",
        "keep the compiled programs in DIR, so that the next start compiles nothing; 'off'",
        systemd="CACHE_DIRECTORY",
    ),
    Setting(
        "state",
        _path_or_off,
        OFF,
        "DIR",
        "keep programs and counts in DIR, a folder of a bpffs such as /sys/fs/bpf/udpwatch, so that replies are also "
        "counted while no agent runs (`udpwatch detach` removes them)",
    ),
    Setting(
        "state_keep",
        _choice(StateKeep),
        "always",
        "WHEN",
        "keep what is in --state: always, or only after a crash; then a stop removes it, like `udpwatch detach`",
    ),
    Setting("node", _text, None, "NAME", "this node's name in events (default: the host name)"),
)

#: Settings that bound memory or work (docs/limits.md).
LIMITS = ("window", "max_peers", "max_series", "max_servers", "events_per_second", "forget")


def resolve(flags: Mapping[str, str | None], environment: Mapping[str, str], file: Path | None) -> Settings:
    """Merge the three sources. Raises UsageError that names the setting, its value and what is expected."""
    from_file = _read(file) if file else {}
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        value: object
        if (value := flags.get(setting.name)) is not None:
            source = setting.flag
        elif (value := environment.get(setting.variable)) is not None:
            source = setting.variable
        elif (value := from_file.get(setting.name)) is not None:
            source = f"{setting.name} in {file}"
        elif setting.systemd and (value := environment.get(setting.systemd)):
            source, value = setting.systemd, value.split(":")[0]
        else:
            source, value = setting.flag, setting.default
        try:
            values[setting.name] = None if value is None else setting.parse(value)
        except _Rejected as expected:
            raise UsageError(f"invalid value {value!r} for {source}: expected {expected}") from None
    values["node"] = values["node"] or socket.gethostname()
    settings = Settings(**values)
    if settings.heal_dry_run and settings.healing is None:
        raise UsageError("--heal-dry-run needs servers to heal: give --heal, --heal-process or --heal-namespace")
    return settings


def _read(file: Path) -> dict[str, object]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {str(file)!r}: {error.strerror}") from None
    except RecursionError:
        raise UsageError(f"--config: cannot parse {str(file)!r} as TOML: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"--config: cannot parse {str(file)!r} as TOML: {error}") from None
    unknown = content.keys() - {setting.name for setting in SETTINGS}
    if unknown:
        names = ", ".join(setting.name for setting in SETTINGS)
        raise UsageError(f"{file}: unknown setting {min(unknown)!r}; valid settings: {names}")
    for name, value in content.items():
        if not _fits(value):
            raise UsageError(f"{file}: invalid value for {name}: expected numbers of at most 64 bits, as TOML has them")
    return content


def _fits(value: object) -> bool:
    """Return whether all integers have 64 bits; tomllib also reads longer ones, which cannot be printed."""
    if isinstance(value, int):
        return -1 << 63 <= value < 1 << 63
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_fits, inner))
