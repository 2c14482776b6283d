"""`deltaserve convert`: a checkpoint lowered ahead of time, without a server."""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltaserve.app import logs
from deltaserve.backbone.load import load, usual_dtype
from deltaserve.backbone.model import Backbone
from deltaserve.catalog.version import Card
from deltaserve.formats import native, registry
from deltaserve.formats.folder import Folder
from deltaserve.formats.native.writing import free
from deltaserve.formats.weighed import Weighed
from deltaserve.formats.work import Work


@dataclass(frozen=True)
class Conversion:
    """What to convert, where to, and for which backbone. `replace`: a converted delta at `destination` may go."""

    source: Path
    destination: Path
    backbone: str
    wanted: registry.Wanted
    served_name: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    allow_pickle: bool = False
    replace: bool = False


@dataclass(frozen=True)
class Converted:
    """What was made. Bytes of the tensor files before and after; seconds of lowering and writing."""

    card: Card
    backbone: str
    dtype: str
    before_bytes: int
    after_bytes: int
    tensors: int
    seconds: float


def convert(job: Conversion, told: Callable[[int, int], None]) -> Converted:
    """`told(done, total)` hears of modules that are lowered. Raises DeltaserveError for what the operator can mend."""
    logs.for_a_command()
    free(job.destination, job.replace)
    Folder(job.source, allow_pickle=job.allow_pickle)  # before the backbone is loaded for nothing
    backbone = load(
        job.backbone,
        served_name=job.served_name,
        revision=job.revision,
        tokenized=False,
        dtype=usual_dtype() if job.dtype == "auto" else job.dtype,
        device="cpu",
    )
    started = time.monotonic()
    weights = Weighed(backbone.weights)
    delta = registry.read(
        job.source, backbone.spec, weights, job.wanted, allow_pickle=job.allow_pickle, work=Work(told=told)
    )
    size, count = native.write(delta, job.destination, backbone.spec, weights, replace=job.replace)
    return Converted(
        card=Card.of(delta),
        backbone=backbone.name,
        dtype=_dtype(backbone),
        before_bytes=delta.provenance.file_bytes,
        after_bytes=size,
        tensors=count,
        seconds=time.monotonic() - started,
    )


def command(source: str, backbone: Backbone, wanted: registry.Wanted) -> str:
    """What to type for one that takes too long while a server runs."""
    words = ["deltaserve", "convert", source, f"{source.rstrip('/')}-converted"]
    words += ["--backbone", backbone.name, "--dtype", _dtype(backbone)]
    if wanted.task is not None:
        words += ["--task", wanted.task.value]
    for label in wanted.labels[:_MOST_LABELS]:
        words += ["--label", label]
    if wanted.task_id is not None:
        words += ["--task-id", str(wanted.task_id)]
    if wanted.problem_type is not None:
        words += ["--problem-type", wanted.problem_type]
    return shlex.join(words)


_MOST_LABELS = 20
"""In a command that is part of a message; the rest can be told when it is loaded."""


def _dtype(backbone: Backbone) -> str:
    return str(backbone.dtype).removeprefix("torch.")
