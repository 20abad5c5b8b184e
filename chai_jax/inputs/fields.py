"""Frozen dataclasses from JSON: each field's annotation says its type and, by `Annotated`, what it may be.

    storage: Annotated[str, ("float32", "int8")] = "float32"
    clusters: Annotated[int, range(1, 2**31)] = 1

What follows the type in `Annotated` may be any container: the value must be in it. Numbers must be finite. Nothing else
has to be written for a field to be checked.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from chai_jax.errors import InputError

INT32_MAX = 2**31 - 1  # of any count: what an int32 of JAX holds
Count = Annotated[int, range(1, INT32_MAX + 1)]
Number = Annotated[int, range(INT32_MAX + 1)]  # of a head, from 0

# Metadata of a field that files of earlier versions do not have: it has a default, and is not written where it is that.
LATER = {"later": True}

NAMES = {str: "a string", int: "a whole number", bool: "true or false", float: "a finite number", NoneType: "null"}


def parse_as(kind: Any, value: Any, where: str, whole: bool = False) -> Any:
    """`value` as a `kind`, with all of its parts checked, even where it is of this kind already.

    Args:
        kind: str, int, bool, float, `X | None`, `str | X`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[X, Y]`, a dataclass of
            such fields, or `Annotated[X, container]` of a str or int. Keys that are whole numbers are strings of digits
            in JSON.
        where: what messages call the value.
        whole: whether an object must name all fields, also those that have a default (but for `LATER` ones).

    Raises:
        InputError: naming the part that is missing, unknown, of another type, or out of range.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where, whole)
    if origin is Annotated:
        return value if type(value) is parts[0] and value in parts[1] else _refuse(kind, value, where)
    if origin in (Union, UnionType):
        kinds = [part for part in parts if part is not NoneType]
        if value is None and NoneType in parts:
            return None
        kind = next((one for one in kinds if (one is str) == isinstance(value, str)), kinds[0])
        return parse_as(kind, value, where, whole)
    if origin is tuple:
        entries = value if isinstance(value, (list, tuple)) else _refuse(kind, value, where)
        each = parts[:1] * len(entries) if parts[-1] is Ellipsis else parts
        entries = entries if len(each) == len(entries) else _refuse(kind, value, where)
        pairs = zip(each, entries, strict=True)
        return tuple(parse_as(one, entry, f"{where}[{at}]", whole) for at, (one, entry) in enumerate(pairs))
    if origin is dict:
        entries = value.items() if isinstance(value, Mapping) else _refuse(kind, value, where)
        return {
            parse_as(parts[0], _number(key), f"a key of {where}"): parse_as(
                parts[1], entry, f"{where}[{brief(key)}]", whole
            )
            for key, entry in entries
        }
    if kind is float:
        return _finite(value, where)
    return value if type(value) is kind else _refuse(kind, value, where)


def _record(kind: Any, value: Any, where: str, whole: bool) -> Any:
    fields = _fields(kind)
    if isinstance(value, kind):
        value = {name: getattr(value, name) for name in fields}
    if not isinstance(value, Mapping):
        _refuse(kind, value, where)
    for name in value:
        if name not in fields:
            raise InputError(f"{where} has an unknown field {brief(name)}; expected some of {', '.join(fields)}")
    for name, (_, needed, later) in fields.items():
        if name not in value and (needed or (whole and not later)):
            raise InputError(f"{where} has no {name}; expected {', '.join(fields)}")
    given = {name: hint for name, (hint, *_) in fields.items() if name in value}
    return kind(**{name: parse_as(hint, value[name], f"{where}.{name}", whole) for name, hint in given.items()})


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool, bool]]:
    """Of each field of a dataclass its annotation, whether it has no default, and whether it came later."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: (hints[field.name], field.default is field.default_factory, "later" in field.metadata)
        for field in dataclasses.fields(kind)
    }


def without_defaults(value: Any) -> dict[str, Any]:
    """A dataclass as a dict for JSON, without its `LATER` fields that are at their defaults."""
    skipped = [
        field.name
        for field in dataclasses.fields(value)
        if "later" in field.metadata and getattr(value, field.name) == field.default
    ]
    return {name: part for name, part in dataclasses.asdict(value).items() if name not in skipped}


def _finite(value: Any, where: str) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond the largest float
        pass
    return _refuse(float, value, where)


def _number(key: Any) -> Any:
    """The whole number that a key of a JSON object stands for; other keys as they are."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key


def _refuse(kind: Any, value: Any, where: str) -> Any:
    raise InputError(f"{where} is {brief(value)}; expected {expected(kind)}")


def expected(kind: Any) -> str:
    """A kind in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated and isinstance(parts[1], range):
        return f"a whole number from {parts[1][0]} to {parts[1][-1]}"
    if origin is Annotated:
        return f"one of {', '.join(parts[1])}"
    if origin in (Union, UnionType):
        return " or ".join(expected(part) for part in parts)
    if origin is tuple:
        return "a list" if parts[-1] is Ellipsis else f"a list of {len(parts)}"
    return NAMES.get(kind, "an object")


def brief(value: Any) -> str:
    """A value as messages name it: short, and in one line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "a number of thousands of digits"
