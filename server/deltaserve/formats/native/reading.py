"""A converted delta from its folder: every part is checked against the backbone, nothing is computed."""

from collections.abc import Collection

import torch

from deltaserve.deltas.adapters import Adapter
from deltaserve.deltas.bases import content_key
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Head, Prefix, SitePrimitive, tensors
from deltaserve.deltas.sites import BackboneSpec, Pooling, SiteType, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.folder import Folder
from deltaserve.formats.heads import CLASSIFIES, readings
from deltaserve.formats.native import document, fit, record
from deltaserve.formats.native.document import Document
from deltaserve.formats.native.wanting import as_wanted, labelled
from deltaserve.formats.wanted import Wanted
from deltaserve.formats.weighed import Weighed, digest
from deltaserve.formats.work import Work

FORMAT = "deltaserve"
_SHOWN = 5


def lower(folder: Folder, backbone: BackboneSpec, weights: Weights, wanted: Wanted, work: Work) -> Delta:
    """The delta that was written, bit for bit. Raises BadCheckpoint with the key or tensor at fault, InvalidArgument.

    Where the numbers were computed from weights of a backbone, this one must have the same.
    """
    del work  # it is done
    told = document.read(folder.config())
    if told.family != backbone.family:
        raise BadCheckpoint(f"converted for a {told.family} backbone; this one is {backbone.family}")
    _same_weights(told, backbone, weights if isinstance(weights, Weighed) else Weighed(weights))
    store = _Store(folder)
    bases = _bases(told, store)
    at = {site: _primitives(site, records, backbone, store) for site, records in told.at.items()}
    prompt = None
    if told.prompt is not None:
        place = "config key 'prompt'"
        prompt = fit.prompt(record.read(told.prompt, place, store.get), backbone, place)
    coupling = None
    if told.coupling is not None:
        place = "config key 'coupling'"
        coupling = fit.coupling(record.read(told.coupling, place, store.get), backbone, place)
    head = _head(told, backbone, store)
    count = store.finish()
    delta = Delta(
        kinds=told.kinds,
        at=at,
        task=told.task,
        provenance=_provenance(folder, told, backbone, count),
        prompt=prompt,
        position_shift=told.position_shift,
        head=head,
        pooling=told.pooling,
        labels=told.labels,
        problem_type=told.problem_type,
        invocation=told.invocation,
        task_id=told.task_id,
        token_types=told.token_types,
        coupling=coupling,
        bases=bases,
    )
    _check_whole(delta, backbone)
    return as_wanted(delta, wanted, backbone)


class _Store:
    """The tensors of the file, each read once however many primitives share it."""

    def __init__(self, folder: Folder) -> None:
        self._file = folder.tensors()
        self._names = frozenset(self._file.names())
        self._read: dict[str, torch.Tensor] = {}

    def get(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise BadCheckpoint(f"tensor {record.shown(name)} is missing", metadata={"tensor": record.shown(name)})
        if name not in self._read:
            self._read[name] = self._file.get(name).contiguous()
        return self._read[name]

    def finish(self) -> int:
        """How many there were. Raises BadCheckpoint if one was not asked for."""
        left = sorted(self._names - self._read.keys())
        if left:
            names = ", ".join(record.shown(name) for name in left[:_SHOWN])
            raise BadCheckpoint(
                f"the config names no place for {len(left)} tensors, the first being {names}",
                reason="TENSORS_LEFT_OVER",
                metadata={"count": str(len(left))},
            )
        return len(self._read)


def _bases(told: Document, store: _Store) -> dict[str, torch.Tensor]:
    """By what they hold, never by what the file says of them: other deltas will get their numbers."""
    found = {}
    for name in told.bases:
        tensor = fit.base(store.get(name), f"config key 'bases', {record.shown(name)}")
        found[content_key(tensor)] = tensor
    if len(found) < len(told.bases):
        raise BadCheckpoint("config key 'bases' has a base twice")
    return found


def _primitives(
    name: str, records: tuple[object, ...], backbone: BackboneSpec, store: _Store
) -> tuple[SitePrimitive, ...]:
    place = f"site {record.shown(name)}"
    site = backbone.sites.get(name)
    if site is None:
        raise BadCheckpoint(f"{place} is not in this backbone", metadata={"site": record.shown(name)})
    found = tuple(fit.at_site(record.read(each, place, store.get), site, backbone, place) for each in records)
    single = [type(each) for each in found if not isinstance(each, Adapter)]
    if not found or len(set(single)) < len(single):
        raise BadCheckpoint(f"{place} has nothing, or two primitives of one type")
    adapters = [each for each in found if isinstance(each, Adapter)]
    if any(each.replaces for each in adapters[:-1]):
        raise BadCheckpoint(f"{place} has adapters behind one that replaces the stream; only the last of them may")
    return found


def _head(told: Document, backbone: BackboneSpec, store: _Store) -> Head | None:
    """There is one exactly where the task needs it."""
    needs = told.task in CLASSIFIES and "classify" in backbone.tasks
    if (told.head is not None) != needs:
        here, there = ("a head" if needed else "no head" for needed in (needs, told.head is not None))
        raise BadCheckpoint(f"config key 'task' is {told.task.value!r}, which has {here} here; the delta has {there}")
    if told.head is None:
        return None
    place = "config key 'head'"
    parts = tuple(record.read(each, f"{place}, entry {n}", store.get) for n, each in enumerate(told.head))
    return Head(fit.head_layers(parts, backbone, told.task, place))


def _check_whole(delta: Delta, backbone: BackboneSpec) -> None:
    """What no single part shows: lengths, positions, pooling, labels. Raises BadCheckpoint."""
    lengths = {p.keys.shape[0] for found in delta.at.values() for p in found if isinstance(p, Prefix)} - {0}
    if len(lengths) > 1:
        raise BadCheckpoint(f"its prefixes have {sorted(lengths)} rows; all have the same number, or none")
    shift = max(lengths, default=0) if backbone.prefix_positions else 0
    if delta.position_shift not in (0, shift):
        raise BadCheckpoint(f"config key 'position_shift' is {delta.position_shift}; its prefixes make it {shift} or 0")
    limit = backbone.max_positions
    if limit is not None and delta.prompt_length + delta.position_shift >= limit:
        raise BadCheckpoint(f"prompt and prefix leave no room for a text: this backbone has {limit} positions")
    if delta.gated and "generate" in backbone.tasks:
        raise BadCheckpoint("a gate averages over all rows of a sequence: it is for encoders, and this is none")
    _check_bases(delta)
    _check_invocation(delta, backbone)
    width = labelled(delta)
    if len(delta.labels) != width:
        raise BadCheckpoint(f"config key 'labels' has {len(delta.labels)} entries; the head has {width} labels")
    if (delta.problem_type is None) != (width == 0):
        raise BadCheckpoint("config key 'problem_type' goes with a head's labels, and only with them")
    able: Collection[Pooling | None] = (None,)
    if delta.head is not None:
        able = readings(delta.task, backbone, delta.prompt is not None)
    if delta.pooling not in able:
        expected = " or ".join(sorted(str(each) for each in able))
        raise BadCheckpoint(f"config key 'pooling' is {delta.pooling}; for this task and family it is {expected}")
    if not delta.at and delta.prompt is None and delta.coupling is None and delta.head is None:
        raise BadCheckpoint("it holds no primitive at all")


def _check_bases(delta: Delta) -> None:
    parts = (part for parts in delta.at.values() for part in parts)
    used = {delta.owners.base_of(tensor) for part in parts for tensor in tensors(part)}
    if not delta.bases.keys() <= used:
        raise BadCheckpoint("config key 'bases' names a tensor that no primitive has a view of")
    whole = (part for part in (delta.prompt, delta.coupling, delta.head) if part is not None)
    if any(delta.owners.base_of(tensor) is not None for part in whole for tensor in tensors(part)):
        raise BadCheckpoint("a prompt, a coupling or a head has a view of a base; its tensors are its own")


def _check_invocation(delta: Delta, backbone: BackboneSpec) -> None:
    """Rows before it have no slot: it goes with linear layers of a decoder alone."""
    place = "config key 'invocation'"
    if not delta.invocation:
        return
    if not all(0 <= token < backbone.vocab_size for token in delta.invocation):
        raise BadCheckpoint(f"{place} holds numbers that are not from 0 to {backbone.vocab_size - 1}")
    sited = all(backbone.sites[name].type in (SiteType.LINEAR, SiteType.CONV1D) for name in delta.at)
    if (
        backbone.encoder_decoder
        or "generate" not in backbone.tasks
        or delta.prompt
        or delta.coupling
        or delta.head
        or not sited
    ):
        raise BadCheckpoint(
            f"{place} goes with linear layers of a decoder-only model, and with no prompt, coupling or head"
        )


def _same_weights(told: Document, backbone: BackboneSpec, weights: Weighed) -> None:
    for name, hashes in told.weights.items():
        site = backbone.sites.get(name)
        if name not in backbone.modules or (site is not None and site.type is SiteType.ATTENTION):
            raise BadCheckpoint(f"config key 'weights' names {record.shown(name)}, which has none here")
        ours = {}
        if "weight" in hashes:
            ours["weight"] = weights.digest(name)
        if "bias" in hashes:
            ours["bias"] = "" if site is None or site.bias is None else digest(site.bias)
        for part, found in ours.items():
            if found != hashes[part]:
                raise BadCheckpoint(
                    f"made for other weights: its numbers were computed from the {part} of {name!r} of the backbone "
                    f"{told.backbone!r}, and here it is another; convert the checkpoint again with this backbone and "
                    "its --dtype",
                    reason="OTHER_WEIGHTS",
                    metadata={"site": name, "part": part},
                )


def _provenance(folder: Folder, told: Document, backbone: BackboneSpec, count: int) -> Provenance:
    made = told.made_from
    warnings = list(made.warnings)
    theirs, ours = (name.rstrip("/").rpartition("/")[2].lower() for name in (told.backbone, backbone.name))
    if theirs != ours:
        warnings.append(f"converted for {told.backbone[:200]!r}; this backbone is {backbone.name!r}")
    return Provenance(
        format=FORMAT,
        content_hash=folder.content_hash(),
        file_bytes=folder.tensor_bytes,
        tensors_matched=count,
        base_model=made.base_model,
        warnings=tuple(dict.fromkeys(warnings)),
        guessed=made.guessed,
        origin=made,
    )
