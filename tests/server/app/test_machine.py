"""What the machine lets us have: quotas of containers, and how memory is divided."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.app import machine
from deltaserve.config import Settings
from deltaserve.errors import FailedPrecondition

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`cgroup({"cpu.max": "..."})`: this container's files."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores(cgroup: Callable[..., None], files: dict[str, str], cores: int) -> None:
    cgroup(files)
    assert machine.cores() == cores


@pytest.mark.parametrize(
    ("told", "environment", "threads"), [(None, "", 8), (3, "5", 3), (None, "5", 5), (None, "5,2", 5), (None, "x", 8)]
)
def test_threads(
    cgroup: Callable[..., None], monkeypatch: pytest.MonkeyPatch, told: int | None, environment: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert machine.threads(Settings(backbone="x", threads=told)) == threads


@pytest.mark.parametrize(
    ("limit", "used", "told", "pool", "kv"),
    [
        (16 * GIB, 8 * GIB, {}, GIB, 2 * GIB),
        (5 * GIB, GIB, {}, GIB // 2, GIB),
        (5 * GIB, GIB, {"pool_bytes": "3MiB", "kv_bytes": "5MiB"}, 3 << 20, 5 << 20),
        (5 * GIB, GIB, {"pool_bytes": "auto", "kv_bytes": "1GiB"}, GIB // 2, GIB),
    ],
)
def test_budget(
    cgroup: Callable[..., None], monkeypatch: pytest.MonkeyPatch, limit: int, used: int, told: Any, pool: int, kv: int
) -> None:
    cgroup({"memory.max": str(limit), "memory.current": str(used)})
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("M", (), {"available": 100 * GIB}))
    assert machine.budget(Settings(backbone="x", **told), CPU) == machine.Budget(pool, kv)


def test_free_memory_is_the_machines_where_no_container_limits_it(cgroup: Callable[..., None]) -> None:
    cgroup({"memory.max": "max", "memory.current": "5"})
    assert machine.free_memory() > 1 << 20


@pytest.mark.parametrize(
    ("free", "fraction", "kv"), [(70 * GIB, 0.9, 61 * GIB), (70 * GIB, 0.5, 29 * GIB), (5 * GIB, 0.9, None)]
)
def test_budget_of_a_gpu(monkeypatch: pytest.MonkeyPatch, free: int, fraction: float, kv: int | None) -> None:
    """Of 80 GiB, what the fraction leaves beside what is in use and the deltas' 1 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GIB))
    settings = Settings(backbone="x", memory_fraction=fraction, pool_bytes="1GiB")
    if kv is None:
        with pytest.raises(FailedPrecondition, match="--memory-fraction"):
            machine.budget(settings, torch.device("cuda"))
    else:
        assert machine.budget(settings, torch.device("cuda")).kv == pytest.approx(kv, abs=16)
