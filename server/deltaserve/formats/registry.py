"""Which library wrote a checkpoint, and what lowers it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import BackboneSpec, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats import peft
from deltaserve.formats.folder import Folder
from deltaserve.formats.wanted import NOTHING_WANTED, Wanted

__all__ = ["KINDS", "Wanted", "content_hash", "read"]

KINDS: tuple[str, ...] = peft.KINDS
"""Kinds of deltas that this release serves."""

Lower = Callable[[Folder, BackboneSpec, Weights, Wanted], Delta]

_FORMATS: Mapping[str, Lower] = {"peft_type": peft.lower}
"""By the config's key that only this library writes."""


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
) -> Delta:
    """Lowers a checkpoint. Every tensor finds its site, and every module that the config targets has its tensors.

    Raises BadCheckpoint where the files are wrong or made for another backbone, FailedPrecondition where they are
    right and this release does not serve them.
    """
    found = Folder(folder, allow_pickle=allow_pickle)
    config = found.config()
    for key, lower in _FORMATS.items():
        if key in config:
            return lower(found, backbone, weights, wanted)
    raise BadCheckpoint(
        f"the config of {folder.name!r} has none of {', '.join(_FORMATS)}: it is not known who wrote it"
    )
