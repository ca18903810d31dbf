"""The names, types and values of all settings."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .config import PretrainConfig

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {NoneType: "null"}
DURATIONS = ("optim.duration", "optim.warmup", "log.save_every", "log.keep_every")


@functools.cache
def setting_types() -> dict[str, Any]:
    """The type of every setting by its full name, such as `optim.lr`."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(PretrainConfig).items():
        if is_dataclass(hint):
            found |= {f"{name}.{leaf}": kind for leaf, kind in get_type_hints(hint).items()}
        else:
            found[name] = hint
    return found


def named_values(config: PretrainConfig) -> Iterator[tuple[str, Any]]:
    """Every setting's full name and value, in the order of the classes."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            for leaf in fields(value):
                yield f"{field.name}.{leaf.name}", getattr(value, leaf.name)
        else:
            yield field.name, value


def convert(value: Any, hint: Any) -> Any:
    """A value as the type of a setting: numbers written as text, lists as tuples.

    Args:
        value: What a file, a command line or Python gave.
        hint: One of `setting_types`.

    Raises:
        ValueError: It is of another type.
    """
    kind, options = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for option in options:
            try:
                return convert(value, option)
            except ValueError:
                continue
        raise ValueError
    if kind is tuple:
        if isinstance(value, str) and "," in value:
            value = value.strip("[]() ").split(",")
        values = [value] if isinstance(value, (str, numbers.Real)) else value
        any_number = options[1:] == (...,)
        if not isinstance(values, Sequence) or not (
            len(values) if any_number else len(values) == len(options)
        ):
            raise ValueError
        return tuple(convert(part, options[0]) for part in values)
    if kind is Literal:
        fits = isinstance(value, str) and value in options
    else:
        if hint in (int, float):
            return _number(value, hint)
        fits = isinstance(value, hint)
    if not fits:
        raise ValueError
    return value


def _number(value: Any, kind: type[int] | type[float]) -> int | float:
    """YAML 1.1 takes `5e-4` and `1e8` for text, so numbers may be written as text too."""
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise ValueError
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError
    return kind(number)


def wanted(name: str) -> str:
    """In words what a setting takes."""
    if name in DURATIONS:
        return "a duration such as '300 epochs', '1000 steps' or '1e8 images'"
    return _words(setting_types()[name])


def _words(hint: Any) -> str:
    kind, options = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_words(option) for option in options)
    if kind is Literal:
        return " or ".join(str(option) for option in options)
    if kind is tuple:
        return "numbers such as [0.5]" if ... in options else "two numbers such as [0.5, 1.0]"
    return _WORDS[hint]


def plain(value: Any) -> Any:
    """A value to compare: Python users write lists where the settings have tuples."""
    return tuple(value) if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
