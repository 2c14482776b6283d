"""`python -m deltaserve.demo.train`, end to end on a tiny budget, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaserve.demo.results import Results
from deltaserve.demo.tasks import COMBINATIONS, RECIPES

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

TINY = ("--threads", "1", "--steps", "4", "--tuning-share", "0.003", "--held-out", "4")


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deltaserve.demo.train", *TINY, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work, assets = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("made") / "assets"
    some = train("--work", str(work), "--assets", str(assets), "--only", "swap", "--only", "count")
    assert some.returncode == 0, some.stderr
    assert not assets.exists()
    done = train("--work", str(work), "--assets", str(assets))
    assert done.returncode == 0, done.stderr
    return work, assets


def test_makes_every_delta_and_says_how_well_it_does(folders: tuple[Path, Path]) -> None:
    _, assets = folders
    results = Results.read(assets)
    assert [delta.name for delta in results.deltas] == [recipe.name for recipe in RECIPES]
    assert {folder.name for folder in (assets / "deltas").iterdir()} == {recipe.name for recipe in RECIPES}
    for delta in results.deltas:
        assert delta.full is not None
        assert 0 < delta.delta.parameters < results.backbone.parameters == delta.full.parameters
        assert delta.delta.steps == delta.full.steps
        files = {file.suffix for file in (assets / "deltas" / delta.name).iterdir()}
        assert files == {".json", ".safetensors"}
    assert [one.deltas for one in results.combinations] == [each.deltas for each in COMBINATIONS]


def test_goes_on_where_it_was(folders: tuple[Path, Path]) -> None:
    """A finished run is not trained again, and gives the same files."""
    work, assets = folders
    checkpoints = {file: file.stat().st_mtime_ns for file in work.glob("*.pt")}
    weights = {file: file.read_bytes() for file in assets.rglob("*.safetensors")}
    again = train("--work", str(work), "--assets", str(assets))
    assert again.returncode == 0, again.stderr
    assert checkpoints == {file: file.stat().st_mtime_ns for file in work.glob("*.pt")}
    assert weights == {file: file.read_bytes() for file in assets.rglob("*.safetensors")}


def test_does_not_go_on_from_another_training(folders: tuple[Path, Path]) -> None:
    work, _ = folders
    done = train("--work", str(work), "--only", "swap", "--seed", "5")
    assert done.returncode == 2
    assert "is of another training" in " ".join(done.stderr.replace("│", " ").split())


def test_writes_no_trace_of_the_machine(folders: tuple[Path, Path]) -> None:
    work, assets = folders
    for file in assets.rglob("*.json"):
        assert str(work.parent.parent) not in file.read_text()
        assert str(Path.home()) + "/" not in file.read_text()
        json.loads(file.read_text())


def test_refuses_a_delta_that_it_does_not_know(tmp_path: Path) -> None:
    done = train("--work", str(tmp_path), "--only", "poetry")
    assert done.returncode == 2
    assert "no delta is called poetry" in done.stderr
    assert not any(tmp_path.iterdir())


def test_tells_its_options() -> None:
    done = train("--help")
    assert done.returncode == 0
    for option in ("--work", "--assets", "--seed", "--threads", "--only"):
        assert option in done.stdout
