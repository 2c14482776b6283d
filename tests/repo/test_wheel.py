"""What is shipped: everything in the four packages, from a checkout and from a source distribution alike."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ROOTS = {
    "deltaserve": "server",
    "deltaserve_kernels": "kernels",
    "deltaserve_protos": "protos",
    "deltaserve_client": "clients/python",
}


def build(what: str, source: Path, into: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", what, "--directory", str(into)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=200,
    )
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", root, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_wheel_holds_every_file_of_the_packages(wheel: Path, files: list[Path]) -> None:
    wanted = {
        str(file.relative_to(folder))
        for package, folder in ROOTS.items()
        for file in files
        if file.is_relative_to(Path(folder) / package)
    }
    assert contents(wheel) == wanted


def test_wheel_holds_what_is_easily_left_out(wheel: Path) -> None:
    names = contents(wheel)
    assert {f"{package}/py.typed" for package in ROOTS} <= names
    assert any(name.endswith("_pb2.py") for name in names)
    assert any(name.startswith("deltaserve/demo/assets/") for name in names)


def test_sdist_makes_the_same_wheel(root: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", root, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert contents(build("wheel", source, tmp_path / "wheel")) == contents(wheel)


def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=100)
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n"
    code += "\n".join(f"import {package}; print({package}.__file__)" for package in ROOTS)
    code += "\nimport deltaserve_protos.v1.inference_pb2_grpc"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(target)) for line in done.stdout.splitlines())
