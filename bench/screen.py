"""Rows on a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.rows import Row, Spread


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def times(rows: Iterable[Row], keys: Sequence[str], title: str) -> Table:
    """Medians and quartiles of timed rows; `keys` are the parameters that tell them apart.

    The first four make a group. MB are those of the deltas on the device.
    """
    table = Table(title=title, title_justify="left")
    for key in keys:
        table.add_column(key)
    for name in ("ms", "ratio", "quartiles", "error", "MB"):
        table.add_column(name, justify="right")
    before = ""
    for row in rows:
        group = " ".join(str(row.parameters.get(key, "")) for key in keys[:4])
        if before and group != before:
            table.add_section()
        before = group
        table.add_row(*(str(row.parameters.get(key, "")) for key in keys), *_measured(row))
    return table


def kept(rows: Iterable[Row], keys: Sequence[str], title: str) -> Table:
    """Each figure beside its limit; MB are those of the deltas, or of the copies, on the device."""
    table = Table(title=title, title_justify="left")
    for key in keys:
        table.add_column(key)
    for name in ("ms", "kept", "quartiles", "limit", "of it", "MB"):
        table.add_column(name, justify="right")
    for row in rows:
        assert row.seconds is not None and row.ratio is not None
        limit = ("", "") if row.limit is None else (f"{row.limit:.3f}", f"{row.ratio.median / row.limit:.0%}")
        table.add_row(
            *(str(row.parameters.get(key, "")) for key in keys), f"{row.seconds.median * 1e3:.2f}",
            f"{row.ratio.median:.3f}", f"{row.ratio.low:.3f}–{row.ratio.high:.3f}", *limit,
            "" if row.nbytes is None else f"{row.nbytes / 1e6:.1f}",
        )  # fmt: skip
    return table


def checks(rows: Iterable[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("what", "parameters", "outcome", "error", "limit", "note"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = {"right": "green", "wrong": "bold red"}.get(row.outcome, "yellow")
        told = " ".join(f"{key}={value}" for key, value in row.parameters.items())
        table.add_row(
            row.name, told, f"[{style}]{row.outcome}[/]", _number(row.error_ratio), _number(row.limit), row.note
        )
    return table


def _measured(row: Row) -> tuple[str, str, str, str, str]:
    if row.seconds is None:
        return (row.outcome, "", "", row.note, "")
    ratio = row.ratio or Spread(float("nan"), float("nan"), float("nan"), 0)
    error = _number(row.error_ratio) + (" WRONG" if row.outcome == "wrong" else "")
    told = "" if row.nbytes is None else f"{row.nbytes / 1e6:.1f}"
    return (
        f"{row.seconds.median * 1e3:.{1 if row.seconds.median > 1e-2 else 3}f}",
        f"{ratio.median:.2f}",
        f"{ratio.low:.2f}–{ratio.high:.2f}",
        error,
        told,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
