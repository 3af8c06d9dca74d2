"""What every dataclass of settings needs: clear refusals, and the way back from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def require(holds: bool, name: str, value: object, bound: str, remedy: str) -> None:
    """Raise a ValueError that names the setting, its value, what it has to be, and what to do."""
    if not holds:
        raise ValueError(f"{name} is {value!r}, but must be {bound}: {remedy}")


def check_choices(settings: object, prefix: str = "") -> None:
    """Raise a ValueError for a setting that is none of its Literal's values."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            choices = ", ".join(map(str, get_args(hint)))
            value = getattr(settings, name)
            require(value in get_args(hint), f"{prefix}{name}", value, f"one of {choices}", "take one of these")


def dataclass_from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Build a (nested) dataclass of settings from plain JSON data; missing settings keep their defaults.

    Raises ValueError for a key that is not a setting, naming it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{path.rstrip('.') or cls.__name__} is {data!r}, but must be settings by name")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            known = ", ".join(hints)
            raise ValueError(f"{path}{key} is not a setting of {cls.__name__}: the settings are {known}")
        if is_dataclass(hints[key]):
            value = dataclass_from_dict(hints[key], value, f"{path}{key}.")
        elif isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        values[key] = value
    return cls(**values)
