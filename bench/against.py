"""Rows of `copies` as Markdown: what each way to serve the same tasks takes, as a multiple of deltaserve's time."""

from collections.abc import Sequence
from typing import Any

from bench.contenders import BESIDE, COPIES, OURS, PEFT_MIXED, PEFT_SET, SWAP

NAME = "copies"
COLUMNS = {
    COPIES: "a copy each, in turn",
    BESIDE: "a copy each, side by side",
    SWAP: "one copy, swapped",
    PEFT_MIXED: "PEFT, mixed batch",
    PEFT_SET: "PEFT, `set_adapter`",
}
"""The bare backbone is no way to serve tasks: its ratio is retention, in a column of its own."""


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Head, alignment, and a line for each case. How many copies fit is told where their time would be."""
    cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        told = row["parameters"]
        key: tuple[str, ...] = (told["shape"], _work(told), told["kind"], told["popularity"], str(told["tasks"]))
        cases.setdefault(key, {})[told["variant"]] = row
    left = ["backbone", "requests", "kind", "popularity", "tasks"]
    right = ["deltaserve, per s", "of bare", *COLUMNS.values(), "MB of deltas", "MB of copies"]
    found = [left + right, ["---"] * len(left) + ["--:"] * len(right)]
    for key, by_variant in cases.items():
        ratios = {name: _ratio(by_variant.get(name)) for name in ("bare backbone", *COLUMNS)}
        found.append(
            [
                *key,
                _rate(by_variant[OURS]),
                *ratios.values(),
                _megabytes(by_variant, OURS),
                _megabytes(by_variant, COPIES),
            ]
        )
    return found


def _work(told: dict[str, Any]) -> str:
    if told["work"] == "decode":
        return f"{told['requests']} streams, decode"
    return f"{told['requests']} × {told['tokens']} tokens, encode"


def _rate(row: dict[str, Any]) -> str:
    """Inputs a second, or tokens."""
    told = row["parameters"]
    done = told["requests"] * max(1, told["generate"] - 1)
    return f"{done / row['seconds']['median']:.0f} {'tokens' if told['generate'] else 'inputs'}"


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return row["note"].partition(" copies")[0] + " fit" if row["ratio"] is None else f"{row['ratio']['median']:.2f}"


def _megabytes(by_variant: dict[str, dict[str, Any]], name: str) -> str:
    nbytes = by_variant[name]["nbytes"] if name in by_variant else None
    return "" if nbytes is None else f"{nbytes / 1e6:.0f}"
