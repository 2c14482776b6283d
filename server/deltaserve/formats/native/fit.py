"""What may stand at which site, with which shapes: what a lowering makes and can be served, and nothing else."""

from collections.abc import Callable, Mapping

import torch

from deltaserve.deltas.adapters import Bottleneck, Coupling, Fusion
from deltaserve.deltas.primitives import (
    Affine,
    Block,
    Dense,
    HeadLayer,
    LowRank,
    Prefix,
    Rows,
    SitePrimitive,
    SoftPrompt,
    Sparse,
    tensors,
)
from deltaserve.deltas.sites import BackboneSpec, Site, SiteType, Task
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.heads import OUTPUTS
from deltaserve.formats.native import adapters
from deltaserve.formats.native.record import Part
from deltaserve.formats.native.shapes import INTEGERS, MOST_ROWS, below, length, tensor
from deltaserve.formats.numbers import fits
from deltaserve.formats.options import MOST_RANK

MOST_LAYERS = 16
"""Of a head."""
LATEST = 1
"""Rows of a text that a soft prompt may stand behind: every text has one."""


def at_site(found: Part, site: Site, spec: BackboneSpec, place: str) -> SitePrimitive:
    """The primitive, whose tensors can act at its site. Raises BadCheckpoint with the tensor or field at fault."""
    check = _FITS[site.type].get(type(found))
    if check is None:
        able = ", ".join(made.__name__ for made in _FITS[site.type])
        raise BadCheckpoint(f"{place} has a {type(found).__name__}; at a site of type {site.type} stands {able}")
    assert not isinstance(found, SoftPrompt | HeadLayer | Coupling)
    if not tensors(found):
        raise BadCheckpoint(f"{place}, {type(found).__name__} has no tensor at all")
    check(found, site, spec, f"{place}, {type(found).__name__}")
    return found


def base(found: torch.Tensor, place: str) -> torch.Tensor:
    """What several deltas may share. Raises BadCheckpoint."""
    tensor(found, (None,) * max(found.ndim, 1), place)
    return found


def prompt(found: Part, spec: BackboneSpec, place: str) -> SoftPrompt:
    """A soft prompt of this backbone's width. Raises BadCheckpoint."""
    if not isinstance(found, SoftPrompt):
        raise BadCheckpoint(f"{place} has a {type(found).__name__}; a SoftPrompt is expected")
    tensor(found.rows, (None, spec.hidden_size), f"{place}, rows")
    length(found.rows.shape[0], spec, place)
    if found.place is not None and not 0 <= found.place <= LATEST:
        raise BadCheckpoint(f"{place}, place is {found.place}; a whole number from 0 to {LATEST} is expected")
    return found


def coupling(found: Part, spec: BackboneSpec, place: str) -> Coupling:
    """A coupling of this backbone's embedded rows. Raises BadCheckpoint."""
    if not isinstance(found, Coupling):
        raise BadCheckpoint(f"{place} has a {type(found).__name__}; a Coupling is expected")
    adapters.coupling(found, spec, place)
    return found


def head_layers(found: tuple[Part, ...], spec: BackboneSpec, task: Task, place: str) -> tuple[HeadLayer, ...]:
    """The layers of a task's head, each as wide as the next one reads. Raises BadCheckpoint."""
    if not 1 <= len(found) <= MOST_LAYERS:
        raise BadCheckpoint(f"{place} has {len(found)} layers; 1 to {MOST_LAYERS} are expected")
    width, layers = spec.hidden_size, []
    for index, layer in enumerate(found):
        here = f"{place}, entry {index}"
        if not isinstance(layer, HeadLayer):
            raise BadCheckpoint(f"{here} has a {type(layer).__name__}; a HeadLayer is expected")
        adapters.activation(layer.activation, f"{here}, activation")
        tensor(layer.weight, (None, width), f"{here}, weight")
        width = int(layer.weight.shape[0])
        if layer.bias is not None:
            tensor(layer.bias, (width,), f"{here}, bias")
        layers.append(layer)
    if OUTPUTS.get(task, width) != width:
        raise BadCheckpoint(f"{place} has {width} outputs; for this task it has {OUTPUTS[task]}")
    return tuple(layers)


def _lowrank(found: LowRank, site: Site, spec: BackboneSpec, place: str) -> None:
    tensor(found.a, (None, site.in_features), f"{place}.a")
    rank = found.a.shape[0]
    if rank > MOST_RANK:
        raise BadCheckpoint(f"{place}.a has rank {rank}; ranks up to {MOST_RANK} are served")
    tensor(found.b, (site.out_features, rank), f"{place}.b")
    if found.inner is not None:
        tensor(found.inner, (rank,) * min(max(found.inner.ndim, 1), 2), f"{place}.inner")
    if found.outer is not None:
        tensor(found.outer, (site.out_features,), f"{place}.outer")
    if not fits(found):
        raise BadCheckpoint(f"{place}: its products with inner or outer are not in float32")


def _affine(found: Affine, site: Site, spec: BackboneSpec, place: str) -> None:
    if found.replace:
        raise BadCheckpoint(f"{place}.replace is true; only a norm's weight and bias can be replaced so")
    for name, numbers, width in (
        ("in_scale", found.in_scale, site.in_features),
        ("scale", found.scale, site.out_features),
        ("shift", found.shift, site.out_features),
    ):
        if numbers is not None:
            tensor(numbers, (width,), f"{place}.{name}")


def _affine_of_norm(found: Affine, site: Site, spec: BackboneSpec, place: str) -> None:
    if found.in_scale is not None:
        raise BadCheckpoint(f"{place}.in_scale is there; a norm has no input side")
    if not found.replace and site.out_features != spec.hidden_size:
        raise BadCheckpoint(f"{place}.replace is false; a norm of heads can only have weights of its own")
    _affine(Affine(None, found.scale, found.shift), site, spec, place)


def _affine_of_embedding(found: Affine, site: Site, spec: BackboneSpec, place: str) -> None:
    if found.in_scale is not None or found.shift is not None:
        raise BadCheckpoint(f"{place} has an in_scale or a shift; at an embedding there is only a scale")
    _affine(found, site, spec, place)


def _dense(found: Dense, site: Site, spec: BackboneSpec, place: str) -> None:
    tensor(found.weight, (site.out_features, site.in_features), f"{place}.weight")
    if found.bias is not None:
        tensor(found.bias, (site.out_features,), f"{place}.bias")


def _dense_of_embedding(found: Dense, site: Site, spec: BackboneSpec, place: str) -> None:
    if not found.replace or found.bias is not None:
        raise BadCheckpoint(f"{place} must replace the embedding, and has no bias")
    tensor(found.weight, (site.in_features, site.out_features), f"{place}.weight")


def _block(found: Block, site: Site, spec: BackboneSpec, place: str) -> None:
    shape, width = list(found.blocks.shape), site.out_features if found.outputs else site.in_features
    tensor(found.blocks, (None,) * min(max(len(shape), 3), 4), f"{place}.blocks")
    count, rows, columns, apart = (*shape, 1)[:4]
    if rows != columns or count * rows * apart != width:
        raise BadCheckpoint(f"{place}.blocks has shape {shape}, which makes no matrix {[width, width]} of blocks")


def _block_of_embedding(found: Block, site: Site, spec: BackboneSpec, place: str) -> None:
    if not found.outputs:
        raise BadCheckpoint(f"{place}.outputs is false; an embedding has no input side")
    _block(found, site, spec, place)


def _sparse(found: Sparse, site: Site, spec: BackboneSpec, place: str) -> None:
    """A place may occur twice: its values add up."""
    tensor(found.values, (None,), f"{place}.values", empty=True)
    count = found.values.shape[0]
    if count > site.in_features * site.out_features:
        raise BadCheckpoint(f"{place}.values has {count} numbers, more than the site's weight")
    tensor(found.index, (2, count), f"{place}.index", INTEGERS, empty=True)
    for row, limit in zip(found.index, (site.out_features, site.in_features), strict=True):
        below(row, limit, f"{place}.index")


def _rows(found: Rows, site: Site, spec: BackboneSpec, place: str) -> None:
    looked_up = site.type is SiteType.EMBEDDING
    width, limit = (site.out_features, site.in_features) if looked_up else (site.in_features, site.out_features)
    tensor(found.index, (None,), f"{place}.index", INTEGERS)
    below(found.index, limit, f"{place}.index")
    if not bool((found.index[1:] > found.index[:-1]).all()):
        raise BadCheckpoint(f"{place}.index is not sorted, or has a number twice")
    tensor(found.values, (found.index.shape[0], width), f"{place}.values")


def _prefix(found: Prefix, site: Site, spec: BackboneSpec, place: str) -> None:
    # PEFT fills an encoder-decoder's own decoder alone; others fill every attention that it has.
    if site.name not in spec.prefix_sites and not spec.encoder_decoder:
        raise BadCheckpoint(f"{place} stands where this family has no prefix")
    shape = (None, site.kv_heads, site.head_dim)
    tensor(found.keys, shape, f"{place}.keys", empty=True)
    tensor(found.values, tuple(found.keys.shape), f"{place}.values", empty=True)
    if found.gate is not None:
        adapters.gate(found.gate, spec.hidden_size, f"{place}.gate")
    length(found.keys.shape[0], spec, place)
    for name, number in (("pre", found.pre), ("tok", found.tok)):
        if abs(number) > 2 * MOST_ROWS:
            raise BadCheckpoint(f"{place}.{name} is {number}; a relative position of at most {2 * MOST_ROWS} is meant")


_Fit = Callable[..., None]
_LINEAR: Mapping[type, _Fit] = {
    LowRank: _lowrank,
    Affine: _affine,
    Dense: _dense,
    Block: _block,
    Sparse: _sparse,
    Rows: _rows,
    Bottleneck: adapters.bottleneck,
    Fusion: adapters.fusion,
}
_FITS: Mapping[SiteType, Mapping[type, _Fit]] = {
    SiteType.LINEAR: _LINEAR,
    SiteType.CONV1D: _LINEAR,
    SiteType.EMBEDDING: {
        LowRank: _lowrank,
        Affine: _affine_of_embedding,
        Block: _block_of_embedding,
        Dense: _dense_of_embedding,
        Rows: _rows,
    },
    SiteType.NORM: {Affine: _affine_of_norm, Bottleneck: adapters.bottleneck, Fusion: adapters.fusion},
    SiteType.ATTENTION: {Prefix: _prefix},
}
