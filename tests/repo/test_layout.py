"""Files are where a reader looks for them, short, and named for what they hold."""

import re
from pathlib import Path

FOLDERS = {"server", "kernels", "protos", "clients", "tests", "bench", ".ci"}
PACKAGES = (
    "server/deltaserve",
    "kernels/deltaserve_kernels",
    "protos/deltaserve_protos",
    "clients/python/deltaserve_client",
)
WALL = 400
EMPTY_WORDS = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "handler", "wrapper", "base", "core"}
EMPTY_CLASS = re.compile(r"^class (\w*(?:Manager|Handler|Helper|Wrapper|Base|Utils?)|Base[A-Z]\w*)\b", re.MULTILINE)


def sources(files: list[Path]) -> list[Path]:
    return [file for file in files if file.suffix == ".py" and "_pb2" not in file.name]


def test_top_level_folders(files: list[Path]) -> None:
    assert {file.parts[0] for file in files if len(file.parts) > 1} <= FOLDERS


def test_length(root: Path, files: list[Path]) -> None:
    lines = {str(file): len((root / file).read_text().splitlines()) for file in sources(files)}
    assert {name: count for name, count in lines.items() if count > WALL} == {}


def test_file_names(files: list[Path]) -> None:
    assert [str(file) for file in sources(files) if EMPTY_WORDS & set(file.stem.split("_"))] == []


def test_class_names(root: Path, files: list[Path]) -> None:
    empty = {str(file): EMPTY_CLASS.findall((root / file).read_text()) for file in sources(files)}
    assert {name: classes for name, classes in empty.items() if classes} == {}


def test_every_package_is_typed(root: Path) -> None:
    assert [name for name in PACKAGES if not (root / name / "py.typed").is_file()] == []


def test_every_folder_of_a_package_is_a_package(files: list[Path]) -> None:
    folders = {file.parent for file in sources(files) if str(file).startswith(PACKAGES)}
    assert sorted(str(folder) for folder in folders if folder / "__init__.py" not in files) == []


def test_no_package_outside_the_four(files: list[Path]) -> None:
    """`kernels` as a package would shadow Hugging Face's; `server` would be a second copy of ours."""
    inits = [str(file) for file in files if file.name == "__init__.py"]
    assert [name for name in inits if not name.startswith(tuple(f"{package}/" for package in PACKAGES))] == []
