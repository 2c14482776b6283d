"""Which library wrote a checkpoint, and what lowers it."""

from collections.abc import Callable
from pathlib import Path

from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import BackboneSpec, Weights
from deltaserve.formats import adapterhub, native, opendelta, peft
from deltaserve.formats import folder as files
from deltaserve.formats.folder import Folder, Layout
from deltaserve.formats.kinds import KINDS
from deltaserve.formats.wanted import NOTHING_WANTED, Wanted
from deltaserve.formats.work import UNLIMITED, Work

__all__ = ["KINDS", "Wanted", "content_hash", "read"]


Lower = Callable[[Folder, BackboneSpec, Weights, Wanted, Work], Delta]
FORMATS: tuple[tuple[tuple[Layout, ...], Lower], ...] = (
    ((files.PEFT,), peft.lower),
    ((files.HUB, files.HUB_SETUP, files.HUB_FUSION), adapterhub.lower),
    ((files.OPENDELTA,), opendelta.lower),
    ((files.NATIVE,), native.lower),
)
"""Whose layouts are lowered by what."""


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
    lower = next(lower for layouts, lower in FORMATS if found.layout in layouts)
    return lower(found, backbone, weights, wanted, work)
