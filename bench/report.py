"""Results as Markdown, as the README quotes them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import micro
from bench.quiet import QUIET

BEGIN, END = "<!-- python -m bench report --readme -->", "<!-- end of the report -->"
COLUMNS = {
    micro.EMPTY: "no delta resident",
    micro.BARE: "8 LoRA resident, unused",
    micro.MIXED: "8 LoRA, one a request",
    micro.PEFT: "PEFT, the same 8 LoRA",
}


def table(file: Path) -> str:
    """The forward of `micro` as ratios to transformers' own, and where they were measured."""
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    origin: dict[str, Any] = {}
    others = 0.0
    for row in _rows(file):
        told, origin, others = row["parameters"], row["origin"], max(others, row["others"])
        key = (told["shape"], _work(told), told["dtype"])
        cases.setdefault(key, {})[told["variant"]] = f"{row['ratio']['median']:.2f}"
    head = ["backbone", "8 requests", "dtype", *COLUMNS.values()]
    lines = [head, ["---"] * 3 + ["--:"] * len(COLUMNS)]
    lines += [[*key, *(ratios.get(variant, "") for variant in COLUMNS)] for key, ratios in cases.items()]
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    where = f"{origin['cpu'].split(' avx')[0]}, {origin['threads']} threads, torch {origin['versions']['torch']}"
    beside = f"; beside it other work kept up to {others:.1f} cores busy" if others > QUIET else ""
    return f"{rows}\n\nMedians over rounds; {where}; {origin['date'][:10]}{beside}."


def quote(readme: Path, file: Path) -> None:
    """Puts the table between the two marks."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme} has not both marks, {BEGIN} and {END}")
    readme.write_text(f"{before}{begin}\n\n{table(file)}\n\n{end}{after}")


def _work(told: dict[str, Any]) -> str:
    if told["work"] == "decode":
        return f"decode 1 token, {told['tokens']} cached"
    return f"encode {told['tokens']} token{'s' * (told['tokens'] != 1)}"


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if row["ratio"] is not None:
            yield row
