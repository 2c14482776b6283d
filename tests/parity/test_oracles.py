"""The recorded answers themselves: every delta moves the output, versions are the pinned ones, all of it is small."""

import json
from pathlib import Path

import pytest
from make.recorded import MOVED, ORACLES
from oracle import Oracle

REPOSITORY = Path(__file__).parents[2]
LIBRARIES = ("adapterhub", "opendelta")
COLUMNS = [(library, table.stem) for library in LIBRARIES for table in sorted((ORACLES / library).glob("*.json"))]
COLUMNS = [column for column in COLUMNS if column[1] != "versions"]
MOST_BYTES = 20 << 20


@pytest.mark.parametrize(("library", "family"), COLUMNS)
def test_every_delta_moves_the_output(library: str, family: str) -> None:
    oracle = Oracle(library, family)
    assert {name for name, row in oracle.cases.items() if not row["moved"] >= MOVED} == set()
    assert {name for name in oracle.cases if not oracle.answers(name)} == set()
    assert oracle.cases.keys() & oracle.cannot.keys() == set()


@pytest.mark.parametrize("library", LIBRARIES)
def test_versions_are_those_that_are_pinned(library: str) -> None:
    made = json.loads((ORACLES / library / "versions.json").read_text())
    assert made.pop("python").startswith("3.11.")
    # OpenDelta is installed without what it asks for, so the Makefile names it.
    pinned = (REPOSITORY / "tests/parity/make" / f"{library}.txt").read_text() + (REPOSITORY / "Makefile").read_text()
    assert {f"{name}=={version.partition('+')[0]}" for name, version in made.items()} <= {
        *pinned.replace(";", " ").split()
    }


@pytest.mark.parametrize(("library", "family"), COLUMNS)
def test_no_checkpoint_names_a_folder_of_the_machine_that_made_it(library: str, family: str, tmp_path: Path) -> None:
    Oracle(library, family).unpack(tmp_path)
    configs = list(tmp_path.rglob("*.json"))
    assert configs and [file for file in configs if "parity/oracles" in file.read_text()] == []


def test_all_of_it_is_small() -> None:
    assert sum(file.stat().st_size for file in ORACLES.rglob("*") if file.is_file()) <= MOST_BYTES
