"""Which library wrote a checkpoint, and what lowers it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import BackboneSpec, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats import folder as files
from deltaserve.formats import native, peft
from deltaserve.formats.folder import Folder, Layout
from deltaserve.formats.kinds import KINDS
from deltaserve.formats.native.record import KEY as NATIVE_KEY
from deltaserve.formats.wanted import NOTHING_WANTED, Wanted
from deltaserve.formats.work import UNLIMITED, Work

__all__ = ["KINDS", "Wanted", "content_hash", "read"]


@dataclass(frozen=True)
class Format:
    """How its files are called, and the config's key that only this library writes there."""

    layout: Layout
    key: str
    lower: Callable[[Folder, BackboneSpec, Weights, Wanted, Work], Delta]


FORMATS = (Format(files.PEFT, "peft_type", peft.lower), Format(files.NATIVE, NATIVE_KEY, native.lower))


def content_hash(folder: Path, *, allow_pickle: bool = False) -> str:
    """SHA-256 over the checkpoint's files, in hexadecimal. Raises BadCheckpoint, FailedPrecondition."""
    return Folder(folder, allow_pickle=allow_pickle).content_hash()


def read(
    folder: Path,
    backbone: BackboneSpec,
    weights: Weights,
    wanted: Wanted = NOTHING_WANTED,
    *,
    allow_pickle: bool = False,
    work: Work = UNLIMITED,
) -> Delta:
    """Lowers a checkpoint. Every tensor finds its site, and every module that the config targets has its tensors.

    Raises BadCheckpoint where the files are wrong or made for another backbone, FailedPrecondition where they are
    right and this release does not serve them, or lowering them would take longer than `work` allows.
    """
    found = Folder(folder, allow_pickle=allow_pickle)
    config = found.config()
    able = [row for row in FORMATS if row.layout == found.layout]
    for row in able:
        if row.key in config:
            return row.lower(found, backbone, weights, wanted, work)
    raise BadCheckpoint(
        f"the config of {folder.name!r} has none of {', '.join(row.key for row in able)}: it is not known who wrote it"
    )
