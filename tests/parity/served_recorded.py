"""What is served of the libraries whose answers are recorded: their part of server/deltaserve/formats/README.md.

    python tests/parity/served_recorded.py   writes that part anew; served.py writes all of the file

Each checkpoint is read over its tiny backbone. That what is read also answers as the library did is test_hub.py's and
test_opendelta.py's to show, for every cell that is served.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from make import adapterhub_cases
from make.recorded import ORACLES
from oracle import Oracle
from signs import CANNOT, COMPARED, REFUSED, UNTRIED, Cell, primitives, quiet, short

from deltaserve.backbone.load import load
from deltaserve.errors import DeltaserveError
from deltaserve.formats.registry import read

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "adapterhub": adapterhub_cases.FAMILIES,
    "opendelta": ("bert", "t5", "gpt2", "llama", "opt", "roberta", "flan-t5"),
}
TITLES = {"adapterhub": "AdapterHub's deltas", "opendelta": "OpenDelta's deltas"}
NAMES = {"adapterhub": "adapters", "opendelta": "opendelta"}
README = Path(__file__).resolve().parents[2] / "server" / "deltaserve" / "formats" / "README.md"
BEGIN = f"# {TITLES['adapterhub']}\n"

Columns = Mapping[str, Mapping[str, Cell]]


def column(library: str, family: str) -> dict[str, Cell]:
    """Every case of one family."""
    oracle = Oracle(library, family)
    backbone = load(str(oracle.backbone), dtype="float32", device="cpu", tokenized=False)
    found = {name: Cell(CANNOT, row["why"]) for name, row in oracle.cannot.items()}
    with tempfile.TemporaryDirectory() as place:
        oracle.unpack(Path(place))
        for name in oracle.cases:
            try:
                delta = read(Path(place) / name, backbone.spec, backbone.weights, allow_pickle=True)
            except DeltaserveError as error:
                found[name] = Cell(REFUSED, error.message)
            else:
                found[name] = Cell(COMPARED, primitives=primitives(delta))
    return found


def columns(library: str) -> Columns:
    return {family: column(library, family) for family in FAMILIES[library]}


def render(library: str, table: Columns) -> list[str]:
    """A library's part of the file."""
    rows = sorted({name for cells in table.values() for name in cells})
    every = [cell.mark for cells in table.values() for cell in cells.values()]
    made = json.loads((ORACLES / library / "versions.json").read_text())
    lines = [
        f"# {TITLES[library]}",
        "",
        f"Made and asked by {NAMES[library]} {made[NAMES[library]]} with transformers {made['transformers']} "
        f"(`make oracles`); {len(every)} cells: {every.count(COMPARED)} served, each held to the library's whole "
        "forwards alone and in a mixed batch,",
        f"{every.count(REFUSED)} refused, {every.count(CANNOT)} that the library itself cannot. Empty ones were not "
        "tried: another family of the kind was.",
        "",
        f"| case | primitives | {' | '.join(table)} |",
        "|---" * (2 + len(table)) + "|",
    ]
    for row in rows:
        cells = [cells.get(row, Cell(UNTRIED)) for cells in table.values()]
        kinds = ", ".join(sorted(set().union(*(cell.primitives for cell in cells))))
        lines.append(f"| {row} | {kinds} | {' | '.join(cell.mark for cell in cells)} |")
    for mark, title in ((REFUSED, "Refused"), (CANNOT, "The library itself cannot")):
        reasons = _reasons(table, mark)
        lines += ["", f"## {title} ({mark}), {TITLES[library]}", "", *reasons] if reasons else []
    return lines


def _reasons(table: Columns, mark: str) -> list[str]:
    """A line for each reason, with the cases and families that it is the reason at."""
    where: dict[str, dict[str, list[str]]] = {}
    for family, cells in table.items():
        for name, cell in cells.items():
            if cell.mark == mark:
                where.setdefault(short(cell.why), {}).setdefault(name, []).append(family)
    return [
        f"- {'; '.join(f'{name} (' + ', '.join(on) + ')' for name, on in cases.items())}: {why}"
        for why, cases in where.items()
    ]


def part() -> str:
    """Both libraries'."""
    lines = [line for library in FAMILIES for line in ("", *render(library, columns(library)))]
    return "\n".join(lines[1:]) + "\n"


def main() -> None:
    with quiet():
        wanted = part()
    README.write_text(README.read_text(encoding="utf-8").partition(BEGIN)[0].rstrip() + "\n\n" + wanted)


if __name__ == "__main__":
    main()
