"""A lowered delta as a folder: written beside its destination, and there all at once or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltaserve.deltas.bases import content_key, octets
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.sites import BackboneSpec
from deltaserve.errors import AlreadyExists, FailedPrecondition
from deltaserve.formats.folder import MOST_DELTA_BYTES, NATIVE
from deltaserve.formats.native import document
from deltaserve.formats.native.record import KEY, VERSION, Part, Record, recorded, viewed
from deltaserve.formats.weighed import Weighed, digest, needs_bias

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
"""As safetensors calls them."""


def write(
    delta: Delta, destination: Path, backbone: BackboneSpec, weights: Weighed, *, replace: bool = False
) -> tuple[int, int]:
    """Writes a delta that was lowered for this backbone with these weights; returns bytes and number of tensors.

    Raises AlreadyExists where something is at `destination`, unless it is a converted delta and `replace`;
    FailedPrecondition where it cannot be written; BadCheckpoint where its words are too long to be read again.
    """
    free(destination, replace)
    place: Path | None = None
    try:
        place = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        store = _Store()
        config = _config(delta, backbone, weights, store)
        text = json.dumps(config, ensure_ascii=False, allow_nan=False, indent=1)
        if len(text.encode()) > MOST_DELTA_BYTES:
            raise FailedPrecondition(
                f"its {NATIVE.config} would have {len(text.encode())} bytes; {MOST_DELTA_BYTES} are read at most"
            )
        document.read(json.loads(text))  # nothing is written that would be refused: a label may be too long
        _file(place / NATIVE.config, text.encode())
        size = store.write(place / NATIVE.tensors)
        place.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
        _moved(place, destination)
    except OSError as error:
        raise FailedPrecondition(
            f"{str(destination)!r} cannot be written: {error.strerror or error}", reason="CANNOT_WRITE"
        ) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    return size, len(store.names)


def free(destination: Path, replace: bool) -> None:
    """Raises AlreadyExists or FailedPrecondition where `write` would: before the work that would be for nothing."""
    if not destination.parent.is_dir():
        raise FailedPrecondition(f"{str(destination.parent)!r} is not a folder", reason="CANNOT_WRITE")
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not _ours(destination):
        raise AlreadyExists(
            f"{str(destination)!r} exists and is no converted delta: choose another destination",
            reason="DESTINATION_EXISTS",
        )
    if not replace:
        raise AlreadyExists(f"{str(destination)!r} exists; --force replaces it", reason="DESTINATION_EXISTS")


def _ours(destination: Path) -> bool:
    """Whether nothing is lost with a folder but a converted delta."""
    try:
        return {file.name for file in destination.iterdir()} <= {NATIVE.config, NATIVE.tensors}
    except OSError:
        return False


class _Store:
    """Tensors by name, the same content once, though never as a base and as a primitive's own.

    The file is written tensor by tensor, without a copy of all of them.
    """

    def __init__(self) -> None:
        self.names: dict[str, torch.Tensor] = {}
        self._known: dict[tuple[str, str], str] = {}

    def add(self, name: str, tensor: torch.Tensor, use: str = "own") -> str:
        """The name under which a tensor is stored, once for each use."""
        key = use, content_key(tensor)
        if key not in self._known:
            assert name not in self.names
            self._known[key] = name
            self.names[name] = tensor
        return self._known[key]

    def write(self, file: Path) -> int:
        """A safetensors file: the length of the header, the header, all bytes one after the other."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in self.names.items():
            start, end = end, end + tensor.numel() * tensor.element_size()
            told = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            header[name] = told
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return _file(file, len(text).to_bytes(8, "little"), text, *self.names.values())


def _file(file: Path, *parts: bytes | torch.Tensor) -> int:
    """Written and on the disk when this returns; its size."""
    with file.open("wb") as stream:
        for part in parts:
            stream.write(part if isinstance(part, bytes) else octets(part))
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()


def _moved(place: Path, destination: Path) -> None:
    """`place` becomes `destination`; what was there before comes back if that fails."""
    if not destination.is_dir():
        place.rename(destination)
        return
    before = place.with_name(place.name + ".before")
    destination.rename(before)
    try:
        place.rename(destination)
    except OSError:
        before.rename(destination)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _config(delta: Delta, backbone: BackboneSpec, weights: Weighed, store: _Store) -> Mapping[str, Any]:
    bases = {key: store.add(f"base.{n}", tensor, "base") for n, (key, tensor) in enumerate(delta.bases.items())}

    def named(name: str, tensor: torch.Tensor) -> str | Record:
        key = delta.owners.base_of(tensor)
        return store.add(name, tensor) if key is None else viewed(tensor, delta.bases[key], bases[key])

    def one(place: str, part: Part) -> Record:
        return recorded(part, lambda field, tensor: named(f"{place} {type(part).__name__}.{field}", tensor))

    layers = () if delta.head is None else delta.head.layers
    return {
        KEY: VERSION,
        "backbone": backbone.name,
        "family": backbone.family,
        "kinds": delta.kinds,
        "task": delta.task,
        "labels": delta.labels,
        "problem_type": delta.problem_type,
        "pooling": delta.pooling,
        "position_shift": delta.position_shift,
        "invocation": delta.invocation,
        "task_id": delta.task_id,
        "token_types": delta.token_types,
        "made_from": _made_from(delta.provenance.origin or delta.provenance, delta.provenance),
        "weights": _weights(delta, backbone, weights),
        "bases": list(bases.values()),
        "prompt": None if delta.prompt is None else one("prompt", delta.prompt),
        "coupling": None if delta.coupling is None else one("coupling", delta.coupling),
        "head": None if delta.head is None else [one(f"head.{n}", layer) for n, layer in enumerate(layers)],
        "at": {site: [one(f"{site} {n}", part) for n, part in enumerate(parts)] for site, parts in delta.at.items()},
    }


def _made_from(first: Provenance, last: Provenance) -> Mapping[str, Any]:
    """The checkpoint that a library wrote, and what was said of it when it was last read."""
    return {
        "format": first.format,
        "content_hash": first.content_hash,
        "file_bytes": first.file_bytes,
        "tensors_matched": first.tensors_matched,
        "base_model": first.base_model,
        "warnings": last.warnings,
        "guessed": last.guessed,
    }


def _weights(delta: Delta, backbone: BackboneSpec, weights: Weighed) -> Mapping[str, Mapping[str, str]]:
    """SHA-256 by site of each weight that the lowering asked for, and of each bias that it may have used."""
    found: dict[str, dict[str, str]] = {site: {"weight": weights.digest(site)} for site in sorted(weights.used)}
    for name, parts in delta.at.items():
        site = backbone.sites[name]
        if site.bias is not None and any(needs_bias(site, part) for part in parts):
            found.setdefault(name, {})["bias"] = digest(site.bias)
    return found


def _umask() -> int:
    """There is no other way to ask than to set it."""
    found = os.umask(0)
    os.umask(found)
    return found
