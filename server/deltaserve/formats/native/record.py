"""Primitives as JSON objects: tensors by name, numbers and words as they are. What a class declares is what is stored.

{"type": "LowRank", "a": "encoder.0.q LowRank.a", "b": "encoder.0.q LowRank.b", "scale": 0.5}; a field that is None is
left out where that is its default. A tensor that is a view of a base is {"base": "base.0", "offset": 0, "shape":
[2, 3], "stride": [8, 1]}, counted in numbers; the name alone is the whole of it. What stands inside a primitive, a gate
or a fusion's members, is an object or a list of them, without a type: the field has one.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, TypeVar

import torch

from deltaserve.deltas.adapters import Bottleneck, Coupling, Fusion
from deltaserve.deltas.primitives import Affine, Block, Dense, HeadLayer, LowRank, Prefix, Rows, SoftPrompt, Sparse
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.folder import NATIVE_KEY

Part = (
    LowRank | Affine | Block | Dense | Sparse | Rows | Prefix | Bottleneck | Fusion | SoftPrompt | HeadLayer | Coupling
)
Record = dict[str, Any]

PRIMITIVES: Mapping[str, type] = {made.__name__: made for made in typing.get_args(Part)}
KEY, VERSION = NATIVE_KEY, 2
"""The config's key that only this format writes, and what it is now."""
TYPE = "type"
MOST_NUMBER = 1 << 31
"""Of whole numbers that are fields of a primitive."""
_MOST_PLACE = 1 << 40
_MOST_INSIDE = 1 << 10
"""Entries of a tuple that is a primitive's field."""

T = TypeVar("T")


def recorded(part: Part, named: Callable[[str, torch.Tensor], str | Record]) -> Record:
    """`named(field, tensor)` stores a tensor and tells its name, or what it is a view of."""
    return {TYPE: type(part).__name__, **_recorded(part, "", named)}


def _recorded(part: object, start: str, named: Callable[[str, torch.Tensor], str | Record]) -> Record:
    def told(name: str, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return named(name, value)
        if isinstance(value, tuple):
            return [told(f"{name}.{index}", each) for index, each in enumerate(value)]
        return _recorded(value, f"{name}.", named) if dataclasses.is_dataclass(value) else value

    values = {field: getattr(part, field.name) for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    return {
        field.name: told(f"{start}{field.name}", value)
        for field, value in values.items()
        if value is not None or field.default is not None
    }


def read(record: object, place: str, tensor: Callable[[str], torch.Tensor]) -> Part:
    """What `recorded` was given; `tensor(name)` finds a tensor. `place` says in errors where it stands.

    Raises BadCheckpoint for a type or field that is not known, missing, or not of its kind.
    """
    told = fields(record, place)
    named = told.pop(TYPE, None)
    made = PRIMITIVES.get(named) if isinstance(named, str) else None
    if made is None:
        raise BadCheckpoint(f"{place} has the type {shown(named)}; known are {', '.join(PRIMITIVES)}")
    part: Part = _made(made, told, f"{place}, {named}", tensor)
    return part


def _made(made: type, told: Record, place: str, tensor: Callable[[str], torch.Tensor]) -> Any:
    """An object of a dataclass from the values of its fields."""
    kinds = typing.get_type_hints(made)
    for key in told:
        if key not in kinds:
            raise BadCheckpoint(f"{place} has a field {shown(key)}, which this release does not know")
    for field in dataclasses.fields(made):
        if field.name not in told and field.default is dataclasses.MISSING:
            raise BadCheckpoint(f"{place} has no field {field.name!r}")
    return made(**{key: _value(kinds[key], value, f"{place}, field {key!r}", tensor) for key, value in told.items()})


def _value(kind: object, value: object, place: str, tensor: Callable[[str], torch.Tensor]) -> object:
    """A field's value by its declared type, of which None is the absence."""
    if typing.get_origin(kind) is tuple:
        inside = typing.get_args(kind)[0]
        return listed(value, place, lambda each, here: _value(inside, each, here, tensor), _MOST_INSIDE)
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return None
    (plain,) = [each for each in kinds if each is not type(None)]
    if plain is torch.Tensor:
        return _view(value, place, tensor) if isinstance(value, dict) else tensor(text(value, place))
    if isinstance(plain, type) and dataclasses.is_dataclass(plain):
        return _made(plain, fields(value, place), place, tensor)
    return word(value, place, plain) if issubclass(plain, StrEnum) else _PLAIN[plain](value, place)


def viewed(view: torch.Tensor, base: torch.Tensor, name: str) -> str | Record:
    """How a view of a base is stored, which has this name."""
    if (view.data_ptr(), view.shape, view.stride()) == (base.data_ptr(), base.shape, base.stride()):
        return name
    offset = (view.data_ptr() - base.data_ptr()) // base.element_size()
    return {"base": name, "offset": offset, "shape": list(view.shape), "stride": list(view.stride())}


def _view(value: dict[str, Any], place: str, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Part of a base, row by row; nothing of it lies outside. Raises BadCheckpoint."""
    if value.keys() != {"base", "offset", "shape", "stride"}:
        raise BadCheckpoint(f"{place} is {shown(value)}; a base, an offset, a shape and a stride are expected")
    base = tensor(text(value["base"], f"{place}, 'base'"))
    offset = integer(value["offset"], f"{place}, 'offset'", _MOST_PLACE)
    shape, stride = (listed(value[key], f"{place}, {key!r}", _size, most=4) for key in ("shape", "stride"))
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=False))
    whole = len(shape) == len(stride) > 0 and stride[-1] == 1 and 0 <= offset <= last < base.numel()
    if not whole:
        raise BadCheckpoint(f"{place} is no part of {shown(value['base'])}, which has shape {list(base.shape)}")
    return base.as_strided(shape, stride, base.storage_offset() + offset)


def _size(value: object, place: str) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_PLACE:
        raise BadCheckpoint(f"{place} is {shown(value)}; a whole number from 1 is expected")
    return value


def text(value: object, place: str, most: int = 1000) -> str:
    """A string of at most so many characters, all of them such that UTF-8 has them. Raises BadCheckpoint."""
    if not isinstance(value, str) or len(value) > most or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadCheckpoint(f"{place} is {shown(value)}; a string of at most {most} characters is expected")
    return value


def integer(value: object, place: str, most: int = MOST_NUMBER) -> int:
    """A whole number whose size is at most `most`. Raises BadCheckpoint."""
    if type(value) is not int or abs(value) > most:
        raise BadCheckpoint(f"{place} is {shown(value)}; a whole number is expected")
    return value


def number(value: object, place: str) -> float:
    """A number that float32 can hold. Raises BadCheckpoint."""
    if type(value) not in (int, float) or not abs(value) <= torch.finfo(torch.float32).max:  # type: ignore[arg-type]
        raise BadCheckpoint(f"{place} is {shown(value)}; a finite number is expected")
    assert isinstance(value, int | float) and math.isfinite(value)
    return float(value)


def flag(value: object, place: str) -> bool:
    """true or false. Raises BadCheckpoint."""
    if not isinstance(value, bool):
        raise BadCheckpoint(f"{place} is {shown(value)}; true or false is expected")
    return value


def word(value: object, place: str, among: type[StrEnum]) -> StrEnum:
    """One of an enumeration's words. Raises BadCheckpoint."""
    if not isinstance(value, str) or value not in tuple(among):
        raise BadCheckpoint(f"{place} is {shown(value)}; expected is one of {', '.join(among)}")
    return among(value)


def fields(value: object, place: str) -> Record:
    """A copy of an object. Raises BadCheckpoint."""
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{place} is {shown(value)}; an object is expected")
    return dict(value)


def listed(value: object, place: str, each: Callable[[object, str], T], most: int = 100_000) -> tuple[T, ...]:
    """A list, each entry read by `each`. Raises BadCheckpoint."""
    if not isinstance(value, list) or len(value) > most:
        raise BadCheckpoint(f"{place} is {shown(value)}; a list of at most {most} entries is expected")
    return tuple(each(entry, f"{place}, entry {index}") for index, entry in enumerate(value))


_PLAIN: Mapping[type, Callable[[object, str], object]] = {float: number, int: integer, bool: flag, str: text}


def shown(value: object) -> str:
    """A value from a file in a message, not too long."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    said = repr(value)
    return said if len(said) <= 80 else said[:79] + "…"
