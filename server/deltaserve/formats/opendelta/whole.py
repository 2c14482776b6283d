"""The backbone's own tensors in a checkpoint; what is as in the backbone is dropped.

They are biases of BitFit (arXiv 2106.10199), what was left to be trained beside a method, or the whole model, where
nothing was frozen.
"""

from dataclasses import dataclass, field

import torch

from deltaserve.deltas.primitives import Affine, Dense, Rows
from deltaserve.deltas.sites import Site, SiteType
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.opendelta import targets
from deltaserve.formats.opendelta.checkpoint import Checkpoint, unserved
from deltaserve.formats.opendelta.places import LINEAR
from deltaserve.formats.options import Options

BITFIT = ("attn@", "ff@", "layer_norm@", "lm_head@.proj@")
BITFIT_OPTIONS = Options(used=frozenset())

_COUNTED = ("embeddings.position_ids", "embeddings.token_type_ids", ".attn.bias", ".attn.masked_bias")
"""Ends of names of what transformers once saved beside weights: it counts, and changes nothing."""
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Other names of T5's one embedding."""
_LANGUAGE = ("cls.", "lm_head.")
"""Begins of names of an encoder's head for masked words."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Tally:
    """How many tensors were as in the backbone, and which modules have others; what goes with no head served here."""

    equal: int = 0
    weights: list[str] = field(default_factory=list)
    left_out: int = 0


def bitfit(checkpoint: Checkpoint, draft: Draft) -> None:
    """y' = y + bias at modules that had none; the values of those that there were are taken by `lower`."""
    draft.kind("bitfit")
    for module in checkpoint.found.get("bitfit", ()):
        site = checkpoint.backbone.sites.get(module)
        if site is None or site.type not in (*LINEAR, SiteType.NORM):
            raise unserved(module, "this backbone has no linear layer and no norm there")
        draft.shift(module, checkpoint.take(f"{module}.bitfit.bias", (site.out_features,)).float())


def lower(checkpoint: Checkpoint, draft: Draft) -> None:
    """Takes every tensor that has a backbone's name. Raises BadCheckpoint, FailedPrecondition."""
    if checkpoint.type == "bitfit":
        _check_biases(checkpoint)
    tally, backbone = Tally(), checkpoint.backbone
    one = (backbone.input_embedding, *backbone.tied)
    if any(checkpoint.has(f"{name}.weight") for name in (*one, *_copies(checkpoint))):
        _tied(checkpoint, draft, tally, one)
    for site in backbone.sites.values():
        if site.type is SiteType.EMBEDDING:
            _embedding(checkpoint, draft, tally, site)
        elif site.type is SiteType.NORM:
            _norm(checkpoint, draft, tally, site)
        elif site.type in LINEAR:
            _linear(checkpoint, draft, tally, site)
    _others(checkpoint, tally)
    if tally.equal:
        checkpoint.warn(f"{tally.equal} of its tensors equal the backbone's and are left out")
    if tally.weights:
        checkpoint.warn(
            f"{len(tally.weights)} modules have weights of their own, which are kept whole, the first being "
            f"{tally.weights[0]!r}"
        )
    if tally.left_out:
        checkpoint.warn(f"{tally.left_out} tensors of a head for masked words are left out: no task here has one")


def _check_biases(checkpoint: Checkpoint) -> None:
    """Every bias below a module that the config means is there. Raises BadCheckpoint."""
    meant = targets.modules(checkpoint, targets.wanted(checkpoint, BITFIT))
    for module in meant or ():
        for site in checkpoint.backbone.sites.values():
            inside = site.name == module or site.name.startswith(module + ".")
            if inside and site.bias is not None and not checkpoint.has(f"{site.name}.bias"):
                raise BadCheckpoint(
                    f"tensor {site.name + '.bias'!r} is missing; its module is one that the config's modified_modules "
                    "means",
                    metadata={"tensor": f"{site.name}.bias"},
                )


def _same(saved: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether it is the backbone's, maybe before that was rounded to the dtype that it is served in."""
    return any(torch.equal(saved.to(dtype).float(), ours) for dtype in (saved.dtype, *_DTYPES))


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    return checkpoint.take(name, shape) if checkpoint.has(name) else None


def _other(
    checkpoint: Checkpoint, tally: Tally, name: str, shape: tuple[int, ...], turned: bool = False
) -> torch.Tensor | None:
    """A module's weight, as a linear has it, unless it is missing or the backbone's."""
    found = _read(checkpoint, f"{name}.weight", shape)
    if found is None:
        return None
    found = found.T.contiguous() if turned else found
    if _same(found, checkpoint.weights(name)):
        tally.equal += 1
        return None
    tally.weights.append(name)
    return found


def _bias(checkpoint: Checkpoint, tally: Tally, site: Site) -> torch.Tensor | None:
    found = _read(checkpoint, f"{site.name}.bias", (site.out_features,))
    if found is not None and site.bias is not None and _same(found, site.bias):
        tally.equal += 1
        return None
    return found


def _linear(checkpoint: Checkpoint, draft: Draft, tally: Tally, site: Site) -> None:
    turned = site.type is SiteType.CONV1D
    shape = (site.out_features, site.in_features)
    weight = _other(checkpoint, tally, site.name, shape[::-1] if turned else shape, turned)
    bias = _bias(checkpoint, tally, site)
    if weight is not None:
        draft.kind("selective-module")
        draft.put(site.name, Dense(weight, site.bias if bias is None else bias, replace=True))
    elif bias is not None:
        _shift(checkpoint, draft, site, bias)


def _norm(checkpoint: Checkpoint, draft: Draft, tally: Tally, site: Site) -> None:
    weight = _other(checkpoint, tally, site.name, (site.out_features,))
    bias = _bias(checkpoint, tally, site)
    if weight is None and bias is not None and site.out_features == checkpoint.backbone.hidden_size:
        _shift(checkpoint, draft, site, bias)
    elif weight is not None or bias is not None:
        draft.kind("selective-module")
        own = checkpoint.weights(site.name) if weight is None else weight
        draft.put(site.name, Affine(scale=own, shift=site.bias if bias is None else bias, replace=True))


def _shift(checkpoint: Checkpoint, draft: Draft, site: Site, bias: torch.Tensor) -> None:
    """What is saved is the value; what the delta adds is the difference."""
    draft.kind("bitfit" if checkpoint.type == "bitfit" else "bias")
    draft.shift(site.name, bias.float() if site.bias is None else bias.float() - site.bias)


def _embedding(checkpoint: Checkpoint, draft: Draft, tally: Tally, site: Site) -> None:
    weight = _other(checkpoint, tally, site.name, (site.in_features, site.out_features))
    if weight is not None:
        draft.kind("selective-module")
        draft.put(site.name, _rows(weight, checkpoint.weights(site.name)) or Dense(weight, replace=True))


def _copies(checkpoint: Checkpoint) -> tuple[str, ...]:
    names = _COPIES if checkpoint.backbone.encoder_decoder else ()
    return tuple(name.removesuffix(".weight") for name in names)


def _tied(checkpoint: Checkpoint, draft: Draft, tally: Tally, names: tuple[str, ...]) -> None:
    """The input embedding and what has its weight. Raises BadCheckpoint where the file has several for them."""
    spec = checkpoint.backbone
    site = spec.sites.get(spec.input_embedding)
    if site is None:
        return
    first: torch.Tensor | None = None
    for name in (*names, *_copies(checkpoint)):
        found = _read(checkpoint, f"{name}.weight", (site.in_features, site.out_features))
        if found is None:
            continue
        if first is not None and not torch.equal(found, first):
            raise BadCheckpoint(
                f"the weight of {name!r} is not that of {names[0]!r}, and in this backbone they are one",
                metadata={"module": name},
            )
        if first is not None:
            tally.equal += 1
        first = found
    assert first is not None
    ours = checkpoint.weights(spec.input_embedding)
    if _same(first, ours):
        tally.equal += 1
        return
    tally.weights.append(spec.input_embedding)
    draft.kind("selective-module")
    rows = _rows(first, ours)
    weight = first if rows is not None or len(names) == 1 else draft.base(first)  # a base is stored once for all
    for name in names:
        bias = spec.sites[name].bias if name != spec.input_embedding else None
        draft.put(name, rows or Dense(weight, bias, replace=True))


def _rows(weight: torch.Tensor, ours: torch.Tensor) -> Rows | None:
    """The rows of a table that are others, where they are at most half of them."""
    index = (weight.float() != ours).any(1).nonzero().flatten()
    if 2 * len(index) > len(ours):
        return None
    return Rows(index.int(), weight[index].contiguous())


def _others(checkpoint: Checkpoint, tally: Tally) -> None:
    """What has no site: counters, heads that answer nothing here, and what is as in the backbone."""
    spec = checkpoint.backbone
    for name in checkpoint.names():
        module, _, part = name.rpartition(".")
        if name.endswith(_COUNTED):
            checkpoint.drop(name)
            tally.equal += 1
        elif "generate" not in spec.tasks and name.startswith(_LANGUAGE):
            checkpoint.drop(name)
            tally.left_out += 1
        elif part == "weight" and module in spec.modules and module not in spec.sites:
            _unsited(checkpoint, tally, module)


def _unsited(checkpoint: Checkpoint, tally: Tally, module: str) -> None:
    """T5's relative positions, OPT's positions: they stay as they are."""
    ours = checkpoint.weights(module)
    if not _same(checkpoint.take(f"{module}.weight", tuple(ours.shape)), ours):
        raise FailedPrecondition(
            f"the checkpoint has another weight of {module!r}, which this release cannot change for one delta",
            reason="OPTION_NOT_SERVED",
            metadata={"module": module},
        )
    tally.equal += 1
