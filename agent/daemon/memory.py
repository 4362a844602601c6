"""Describe what the agent knows as JSON, and read what another process, maybe of another version, described.

A dataclass is an object of its fields. Fields that the reader lacks are left out; fields that the writer lacked have
their default.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast, get_type_hints

_Described = TypeVar("_Described")
_FIELDS: dict[type, tuple[str, ...]] = {}  # of each type that was described; empty: no dataclass


def described(value: Any) -> Any:
    """Return a dataclass, and those in its fields, as dictionaries; anything else as it is.

    Unlike asdict(), this copies nothing.
    """
    kind = type(value)
    names = _FIELDS.get(kind)
    if names is None:
        names = _FIELDS[kind] = tuple(each.name for each in fields(kind)) if is_dataclass(kind) else ()
    return {name: described(getattr(value, name)) for name in names} if names else value


def restored(kind: type[_Described], described: Mapping[str, Any]) -> _Described:
    """Return a flat dataclass from its description. Raises LookupError, TypeError or ValueError if that is invalid."""
    hints = _hints(cast(Hashable, kind))
    values = {}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name not in described:
            continue
        value, hint = described[each.name], hints[each.name]
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            value = hint(value)
        elif hint in (int, float, str) and not isinstance(value, (int, float) if hint is float else hint):
            raise TypeError(f"invalid value {value!r} for {each.name}")
        values[each.name] = value
    return kind(**values)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def numbers(described: Mapping[str, Any]) -> dict[str, int]:
    """Return a mapping from names to whole numbers. Raises TypeError or ValueError if it is none."""
    return {str(name): int(value) for name, value in described.items()}
