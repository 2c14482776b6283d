"""Finds the sites of a transformers model: what a BackboneSpec says of it."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaserve.backbone.families import Family
from deltaserve.deltas.sites import (
    THROUGH_POOLER,
    Axis,
    BackboneSpec,
    HeadSpec,
    Pooling,
    Site,
    SiteType,
    Sublayer,
    Task,
)


def named_modules(family: Family, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Every module by its canonical name: as in the task model, so with the prefix where only the base is loaded."""
    prefix = family.prefix + "." if family.base_only else ""
    return {prefix + name: module for name, module in model.named_modules() if name}


def spec(name: str, family: Family, model: PreTrainedModel, has_pooler: bool) -> BackboneSpec:
    """Reads off names, shapes, axes and biases. Touches no weight but biases, which it copies to the host."""
    config = model.config
    modules = named_modules(family, model)
    sites = {
        found.name: found
        for path, module in modules.items()
        if (found := _site(path, module, family, config)) is not None
    }
    # A table that an attention reads by itself, T5's of relative positions, is given no rows of requests.
    inner = {path for path, site in sites.items() if site.type is SiteType.EMBEDDING and _attended(path, sites)}
    sites = {path: site for path, site in sites.items() if path not in inner}
    heads = _heads(family, config)
    if family.pooler is not None and not has_pooler:
        sites = {path: site for path, site in sites.items() if not path.startswith(family.pooler + ".")}
        heads = {task: head for task, head in heads.items() if head.pooling not in THROUGH_POOLER}
    prefix_sites = tuple(
        path
        for path in modules
        for row in family.attentions
        if row.axis is family.prefix_axis and re.fullmatch(row.pattern, path)
    )
    first = family.first_position(config)
    looked_up = model.get_input_embeddings()
    alike = [path for path, module in modules.items() if getattr(module, "weight", None) is looked_up.weight]
    embedding = next(path for path in alike if modules[path] is looked_up)
    limit = getattr(config, "max_position_embeddings", None) if family.absolute_positions else None
    return BackboneSpec(
        name=name,
        family=family.name,
        sites=sites,
        modules=tuple(modules),
        prefix=family.prefix,
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        prefix_sites=prefix_sites,
        prefix_positions=family.prefix_positions,
        heads=heads,
        tasks=family.jobs,
        encoder_decoder=bool(config.is_encoder_decoder),
        prefix_pre=family.prefix_pre,
        input_embedding=embedding,
        tied=tuple(path for path in alike if path != embedding),
        first_position=first,
        max_positions=None if limit is None else int(limit) - first,
        sublayers=tuple(_sublayers(family, config, modules)),
    )


def _sublayers(family: Family, config: object, modules: dict[str, torch.nn.Module]) -> Iterator[Sublayer]:
    """An encoder's, then a decoder's, whose layers are counted on."""
    post, layer = family.post_norm(config), 0
    for decoder in (False, True):
        rows = [row for row in family.sublayers if row.decoder is decoder]
        for number in itertools.count():
            here = [row for row in rows if row.last.format(number) in modules]
            if not here:
                break
            for row in here:
                yield Sublayer(
                    layer=layer,
                    part=row.part,
                    first=tuple(name.format(number) for name in row.first if name.format(number) in modules),
                    last=row.last.format(number),
                    norm=row.norm.format(number),
                    post=post,
                    decoder=decoder,
                    sandwich=None if row.sandwich is None else row.sandwich.format(number),
                )
            layer += 1


def _heads(family: Family, config: object) -> dict[Task, HeadSpec]:
    if not family.averages(config):
        return dict(family.heads)
    return {
        task: replace(head, pooling=Pooling.POOLER_MEAN) if head.pooling is Pooling.POOLER else head
        for task, head in family.heads.items()
    }


def _attended(path: str, sites: dict[str, Site]) -> bool:
    parent = sites.get(path.rpartition(".")[0])
    return parent is not None and parent.type is SiteType.ATTENTION


def _axis(path: str, family: Family) -> Axis:
    return next((axis for pattern, axis in family.axes if re.fullmatch(pattern, path)), Axis.TOKENS)


def _site(path: str, module: torch.nn.Module, family: Family, config: object) -> Site | None:
    axis = _axis(path, family)
    row = next((r for r in family.attentions if re.fullmatch(r.pattern, path)), None)
    if row is not None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # type: ignore[attr-defined]
        return Site(
            path,
            SiteType.ATTENTION,
            row.axis,
            kv_heads=int(heads),
            head_dim=int(getattr(module, family.head_dim)),
        )
    if isinstance(module, torch.nn.Linear):
        return Site(path, SiteType.LINEAR, axis, module.in_features, module.out_features, _host(module.bias))
    if isinstance(module, Conv1D):
        return Site(path, SiteType.CONV1D, axis, int(module.weight.shape[0]), int(module.nf), _host(module.bias))
    if isinstance(module, torch.nn.Embedding):
        # OPT's positions are given a mask instead of ids, and Gemma's tokens are multiplied.
        if type(module) is not torch.nn.Embedding and not hasattr(module, "embed_scale"):
            return None
        factor = float(getattr(module, "embed_scale", 1.0))
        return Site(path, SiteType.EMBEDDING, axis, module.num_embeddings, module.embedding_dim, factor=factor)
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.nn.Parameter) and weight.ndim == 1:
        width = int(weight.shape[0])
        return Site(path, SiteType.NORM, axis, width, width, _host(getattr(module, "bias", None)))
    return None


def _host(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().float().cpu().clone()
