"""What `doctor` looks at. Each check yields findings, and needs nothing to be installed."""

import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from deltaserve.cli import screen

OK: Literal["ok"] = "ok"
NOTE: Literal["note"] = "note"
BAD: Literal["bad"] = "bad"

CLIENT = ("grpcio", "protobuf")
SERVER = ("torch", "triton", "transformers", "tokenizers", "safetensors")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
TIGHT_DISK, TIGHT_MEMORY = 2 << 30, 1 << 30


@dataclass(frozen=True)
class Finding:
    """`state`: ok; note, what limits something; bad, what breaks something. `hint` says what to do about it."""

    name: str
    found: str
    state: Literal["ok", "note", "bad"] = OK
    hint: str = ""


Check = Callable[[], Iterator[Finding]]


def versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("deltaserve", *CLIENT, *SERVER):
        try:
            yield Finding(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, "not installed", NOTE)


def device() -> Iterator[Finding]:
    try:
        import torch
    except ModuleNotFoundError:
        yield Finding("device", "unknown without torch", NOTE, "pip install 'deltaserve[server]' to serve from here")
        return
    except (ImportError, OSError) as error:
        yield Finding("device", f"torch does not load: {error}", BAD, "install a torch that fits this machine")
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        yield Finding("device", f"cpu ({torch.get_num_threads()} threads); this torch is {built}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        memory = screen.size(found.total_memory)
        yield Finding(f"cuda:{index}", f"{found.name}, {memory}, compute capability {found.major}.{found.minor}")


def cpu() -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    flags = " ".join(flag for flag in CPU_FLAGS if flag in known)
    yield Finding("cpu", f"{usable} of {cores} cores usable" + (f"; {flags}" if flags else ""))


def room() -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    state = NOTE if free < TIGHT_DISK else OK
    yield Finding(
        "disk", f"{screen.size(free)} free for models in {cache}", state, "HF_HOME moves it" if state == NOTE else ""
    )
    try:
        import psutil
    except ModuleNotFoundError:
        return
    memory = psutil.virtual_memory()
    state = NOTE if memory.available < TIGHT_MEMORY else OK
    yield Finding("memory", f"{screen.size(memory.available)} of {screen.size(memory.total)} free", state)


def ports() -> Iterator[Finding]:
    try:
        from deltaserve.config import Settings
    except ModuleNotFoundError:
        return  # a client's machine: nothing will listen here
    host = Settings.model_fields["host"].default
    for field in ("grpc_port", "metrics_port"):
        port = Settings.model_fields[field].default
        name = f"port {port}"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                hint = f"--{field.replace('_', '-')} takes another"
                yield Finding(name, f"not free on {host}: {error.strerror}", NOTE, hint)
            else:
                yield Finding(name, f"free on {host}")


def kernels() -> Iterator[Finding]:
    try:
        import torch

        from deltaserve_kernels import lowrank
        from deltaserve_kernels.dispatch import Implementation, choose, forced
        from deltaserve_kernels.rowmap import RowMap
        from deltaserve_kernels.testing import error_ratio
    except (ImportError, OSError):
        return  # `device` says why
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator().manual_seed(0)
    table = lowrank.LowRankTable(4, place)
    for slot in range(3):
        a, b = (torch.randn(*shape, generator=random).to(place) for shape in ((8, 64), (96, 8)))
        table.put(slot, (a, b), (0.5,))
    rowmap = RowMap.of([(0, 2), (-1, 1), (2, 2), (1, 2)], place)
    x = torch.randn(rowmap.rows, 64, generator=random).to(place)
    ours, reference = (torch.ones(rowmap.rows, 96, device=place) for _ in range(2))
    lowrank.apply(ours, x, rowmap, table)
    with forced(Implementation.REFERENCE):
        lowrank.apply(reference, x, rowmap, table)
    ratio = error_ratio(ours, reference)
    found = f"low rank by {choose(place).value} on {place.type}: error ratio {ratio:.1e}"
    right = ratio < 1e-5
    yield Finding("kernels", found, OK if right else BAD, "" if right else "answers would be wrong; please report this")


CHECKS: tuple[Check, ...] = (versions, cpu, device, kernels, room, ports)
