"""Results as Markdown, as the README quotes them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import against, micro
from bench.quiet import QUIET

MARKS = {
    "micro": ("<!-- python -m bench report --readme -->", "<!-- end of the report -->"),
    "copies": ("<!-- python -m bench report bench/results/copies.jsonl --readme -->", "<!-- end of copies -->"),
}
"""Where in the README the rows of a bench are quoted: between these two."""
COLUMNS = {
    micro.EMPTY: "no delta resident",
    micro.BARE: "8 LoRA resident, unused",
    micro.MIXED: "8 LoRA, one a request",
    micro.PEFT: "PEFT, the same 8 LoRA",
}


def table(file: Path) -> str:
    """The rows of a bench as ratios, each table with a line on where it was measured."""
    rows = list(_rows(file))
    of_copies = [row for row in rows if row["name"] == against.NAME]
    if of_copies:
        return _copies(of_copies)
    parts = [_loras([row for row in rows if row["name"].startswith("micro.")])]
    of_kinds = [row for row in rows if row["name"].startswith("kinds.")]
    return "\n\n".join(parts + ([_kinds(of_kinds)] if of_kinds else []))


def _copies(rows: Sequence[dict[str, Any]]) -> str:
    return f"{_markdown(against.lines(rows))}\n\nMedians over rounds; {_where(rows)}."


def _loras(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios to transformers' own forward."""
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        told = row["parameters"]
        key = (told["shape"], _work(told), told["dtype"])
        cases.setdefault(key, {})[told["variant"]] = f"{row['ratio']['median']:.2f}"
    head = ["backbone", "8 requests", "dtype", *COLUMNS.values()]
    lines = [head, ["---"] * 3 + ["--:"] * len(COLUMNS)]
    lines += [[*key, *(ratios.get(variant, "") for variant in COLUMNS)] for key, ratios in cases.items()]
    return f"{_markdown(lines)}\n\nMedians over rounds; {_where(rows)}."


def _kinds(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios to the bare backbone's forward, and megabytes of one delta; one line for each kind."""
    works: dict[tuple[str, str], None] = {}
    kinds: dict[tuple[str, str], dict[tuple[str, str], tuple[str, str]]] = {}
    for row in rows:
        told = row["parameters"]
        work = (told["shape"], f"{_work(told)}, {told['dtype']}")
        works[work] = None
        cell = (f"{row['ratio']['median']:.2f}", f"{row['nbytes'] / told['deltas'] / 1e6:.1f}")
        kinds.setdefault((told["kind"], told["at"]), {})[work] = cell
    order = sorted(kinds, key=lambda kind: not kind[1])  # the mix, which is at no place of its own, is last
    head = ["kind", "at", *(cell for shape, work in works for cell in (f"{shape}, {work}", "MB"))]
    lines = [head, ["---"] * 2 + ["--:"] * (2 * len(works))]
    lines += [[*kind, *(cell for work in works for cell in kinds[kind].get(work, ("", "")))] for kind in order]
    said = "One forward of 32 requests for 16 deltas, of one kind or of 16, divided by the bare backbone's on as many "
    said += "rows; MB of one delta on the device, what deltas share divided among them:"
    return f"{said}\n\n{_markdown(lines)}\n\nMedians over rounds; {_where(rows)}."


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _where(rows: Sequence[dict[str, Any]]) -> str:
    origin, others = rows[-1]["origin"], max(row["others"] for row in rows)
    where = f"{origin['cpu'].split(' avx')[0]}, {origin['threads']} threads, torch {origin['versions']['torch']}"
    beside = f"; beside it other work kept up to {others:.1f} cores busy" if others > QUIET else ""
    return f"{where}; {origin['date'][:10]}{beside}"


def quote(readme: Path, file: Path) -> None:
    """Puts the table between the two marks of its bench."""
    bench = against.NAME if any(row["name"] == against.NAME for row in _rows(file)) else "micro"
    first, last = MARKS[bench]
    before, begin, rest = readme.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{readme} has not both marks, {first} and {last}")
    readme.write_text(f"{before}{begin}\n\n{table(file)}\n\n{end}{after}")


def _work(told: dict[str, Any]) -> str:
    if told["work"] == "decode":
        return f"decode 1 token, {told['tokens']} cached"
    return f"encode {told['tokens']} token{'s' * (told['tokens'] != 1)}"


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if row["ratio"] is not None or row["outcome"] == "left out":
            yield row
