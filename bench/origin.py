"""Where rows come from: machine, versions, commit."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import torch

from bench.rows import Origin

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "triton")


def origin(seed: int, device: torch.device) -> Origin:
    """As of now; `device` is where tensors are."""
    return Origin(
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=seed,
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _commit() -> str:
    """Empty outside a checkout. Results themselves do not count as a difference."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--", ":!bench/results") else "")
    except FileNotFoundError:
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    """The model's name, and what it multiplies bfloat16 with."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    text = cpuinfo.read_text()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in text.split()]
    return " ".join([*(names[:1] or [platform.machine()]), *flags])
