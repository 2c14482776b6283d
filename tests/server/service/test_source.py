"""Paths that callers give: below the root, whatever is linked where."""

from pathlib import Path

import pytest

from deltaserve.errors import FailedPrecondition, InvalidArgument
from deltaserve.service.source import at_start, below, shown


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/a/b", "root/store", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outside" / "secret").write_text("s")
    (tmp_path / "root" / "store" / "file").write_text("f")
    (tmp_path / "root" / "a" / "file").symlink_to("../store/file")
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "loop").symlink_to("loop")
    (tmp_path / "root" / "leak").mkdir()
    (tmp_path / "root" / "leak" / "file").symlink_to("../../outside/secret")
    return tmp_path / "root"


@pytest.mark.parametrize("given", ["a", "a/b", "./a", "a/", "a//b", ".", "missing"])
def test_below(root: Path, given: str) -> None:
    """What does not exist is for the reader of checkpoints to say; links that stay inside are fine."""
    assert below(root, given) == (root / given).resolve()


@pytest.mark.parametrize(
    "given",
    [
        "",
        "/",
        "/etc",
        "..",
        "a/..",
        "a/../../outside",
        "out",
        "out/x",
        "leak",
        "a\0",
        "a\\..\\..",
        "loop/x",
        "a" * 5000,
    ],
)
def test_not_below(root: Path, given: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        below(root, given)
    assert (refused.value.reason, refused.value.field) == ("BAD_SOURCE", "source")
    assert str(root.parent) not in refused.value.message


def test_a_root_that_is_itself_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(root)
    assert below(tmp_path / "linked", "a") == root / "a"
    assert shown(tmp_path / "linked", root / "a" / "b") == "a/b"


def test_without_a_root() -> None:
    with pytest.raises(FailedPrecondition, match="--delta-root"):
        below(None, "a")


def test_what_the_operator_names_at_the_start(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert at_start(root, "a") == root / "a"
    assert at_start(root, "outside") == at_start(None, "outside") == tmp_path / "outside"
    assert at_start(root, str(tmp_path / "outside")) == tmp_path / "outside"
    assert shown(root, tmp_path / "outside") == str(tmp_path / "outside")
