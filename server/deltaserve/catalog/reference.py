"""How a delta is named: `[tenant/]name`, with `@version` where one version is meant."""

import re
from dataclasses import dataclass

from deltaserve.errors import InvalidArgument

_PART = r"[a-z0-9][a-z0-9._-]{0,62}"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_RULE = "a name is [tenant/]name, each part of 1 to 63 of a-z 0-9 . _ - and beginning with a letter or digit"


@dataclass(frozen=True)
class Reference:
    """A name, and a version's number or None for the one that new requests get."""

    name: str
    number: int | None = None

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}@{self.number}"


def parse_name(text: str, field: str = "name") -> str:
    """A name without a version. Raises InvalidArgument."""
    if "@" in text:
        raise InvalidArgument(f"{text!r}: give the name without a version here", reason="BAD_NAME", field=field)
    if _NAME.fullmatch(text) is None:
        raise InvalidArgument(f"{text[:200]!r} is not a delta's name: {_RULE}", reason="BAD_NAME", field=field)
    return text


def parse(text: str, field: str = "name") -> Reference:
    """`name` or `name@version`. Raises InvalidArgument."""
    name, at, number = text.partition("@")
    parse_name(name, field)
    if not at:
        return Reference(name)
    if _NUMBER.fullmatch(number) is None:
        raise InvalidArgument(
            f"{text[:200]!r}: what follows the @ is a version's number, from 1", reason="BAD_NAME", field=field
        )
    return Reference(name, int(number))
