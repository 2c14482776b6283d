"""What this machine lets the process have: cores and memory. Containers count."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from deltaserve.config import Settings
from deltaserve.errors import FailedPrecondition

_CGROUP = Path("/sys/fs/cgroup")
_POOL_SHARE, _MOST_POOL = 1 / 8, 1 << 30
_KV_SHARE, _MOST_KV = 1 / 4, 4 << 30


@dataclass(frozen=True)
class Budget:
    """Bytes of the device for deltas, and for keys and values."""

    pool: int
    kv: int


def cores() -> int:
    """Cores that may be used: by affinity, and by the container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, _quota(_CGROUP) or usable))


def threads(settings: Settings) -> int:
    """Threads of the engine: what was asked for, else what OMP_NUM_THREADS says, else all usable cores."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return settings.threads or (int(told) if told.isdigit() and int(told) else cores())


def budget(settings: Settings, device: torch.device) -> Budget:
    """How memory is divided, once the backbone is loaded.

    CPU: an eighth of what is free for deltas, 1 GiB at most; a quarter for keys and values, 4 GiB at most. CUDA: the
    same for deltas; for keys and values what --memory-fraction leaves beside the backbone and the deltas.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        pool = settings.pool_bytes or min(_MOST_POOL, int(free * _POOL_SHARE))
        left = int(total * settings.memory_fraction) - (total - free) - pool
        if settings.kv_bytes is None and left <= 0:
            raise FailedPrecondition(
                f"nothing is left of the device's {total} bytes for keys and values: {total - free} are in use, {pool} "
                f"are for deltas, and --memory-fraction is {settings.memory_fraction}; raise it, lower --pool-bytes, "
                "or give --kv-bytes",
                reason="NO_MEMORY",
            )
        return Budget(pool, settings.kv_bytes or left)
    free = free_memory()
    pool = settings.pool_bytes or min(_MOST_POOL, int(free * _POOL_SHARE))
    return Budget(pool, settings.kv_bytes or min(_MOST_KV, int(free * _KV_SHARE)))


def free_memory() -> int:
    """Bytes of host memory that can still be had."""
    free = int(psutil.virtual_memory().available)
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _quota(cgroup: Path) -> int | None:
    """Whole cores of a quota, of either version of cgroups."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota, period = (str(_number(cgroup / "cpu" / f"cpu.cfs_{name}_us") or "max") for name in ("quota", "period"))
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return max(1, int(quota) // int(period))


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
