"""Every kernel compiles for GPUs that are not here: no spills, within shared memory, products on tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def compiled(tmp_path: Path, chips: str, seconds: float) -> dict[str, list[dict[str, object]]]:
    """In a process of its own: here kernels are defined for the interpreter."""
    file = tmp_path / "aot.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "aot", "--out", str(file), "--chips", chips],
        cwd=root, env={**env, "TRITON_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True,
        timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    kernels: dict[str, list[dict[str, object]]] = {}
    for one in json.loads(file.read_text())["kernels"]:
        kernels.setdefault(str(one["chip"]), []).append(one)
    return kernels


@pytest.mark.timeout(300)
def test_hopper(tmp_path: Path) -> None:
    found = compiled(tmp_path, "sm_90", 280)["sm_90"]
    # 60, and 10 for adapters: what they add, and float32 rows beside weights in bfloat16, which they read.
    assert 10 < len(found) <= 70
    assert all(one["stack"] == 0 for one in found)
    assert any("wgmma.mma_async" in one["products"] for one in found)  # type: ignore[operator]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_chips(tmp_path: Path) -> None:
    chips = ("sm_80", "sm_90", "sm_100", "gfx942")
    found = compiled(tmp_path, ",".join(chips), 880)
    assert set(found) == set(chips) and len({len(kernels) for kernels in found.values()}) == 1
    assert any("tcgen05.mma" in one["products"] for one in found["sm_100"])  # type: ignore[operator]
