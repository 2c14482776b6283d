"""The repository as its tests see it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file that is, or would be, committed, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = sorted({name for name in listed.stdout.split("\0") if name})
    return [Path(name) for name in names if (root / name).is_file()]


@pytest.fixture(scope="session")
def readme_server(root: Path, serving: Callable[..., str]) -> str:
    """The address of what `make demo ARGS="--keep"` leaves: the built-in backbone with all its deltas."""
    assets = root / "server" / "deltaserve" / "demo" / "assets"
    names = sorted(folder.name for folder in (assets / "deltas").iterdir() if folder.is_dir())
    assert names, "the demo has no deltas"
    return serving(assets / "backbone", delta_root=assets / "deltas", delta=tuple(f"{name}={name}" for name in names))
