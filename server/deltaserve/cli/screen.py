"""Results on a terminal, in a pipe and as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS = 160


def console() -> Console:
    """Standard output; a pipe gets wide lines instead of folded ones."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else PIPE_COLUMNS)


def line(text: str) -> None:
    """Text as it is: what the model says is neither folded nor taken for markup."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def as_json(result: Any, indent: bool = True) -> None:
    """A result, or a list of them, as one JSON document; numbers that JSON does not have are null."""
    line(json.dumps(_plain(result), ensure_ascii=False, indent=2 if indent and sys.stdout.isatty() else None))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Cells are taken as text, never as markup; the columns in `right` are numbers."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        number = column in right
        shown.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    console().print(shown)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values, one a line; empty values are left out."""
    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="dim")
    shown.add_column(overflow="fold")
    for name, value in pairs:
        if value not in ("", None, ()):
            shown.add_row(name, Text(str(value)))
    console().print(shown)


def size(count: int) -> str:
    """Bytes as people read them: 1.5 GiB."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def amount(count: int) -> str:
    """A number as people read it: 1.5 M."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T")).rstrip()


def _scaled(count: int, base: int, units: Sequence[str]) -> str:
    step = min(int(math.log(count, base)), len(units) - 1) if count > 0 else 0
    value = count / base**step
    if step and round(value, 1) >= base and step + 1 < len(units):
        step, value = step + 1, value / base
    return f"{value:.1f} {units[step]}" if step else f"{count} {units[0]}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
