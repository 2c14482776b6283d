"""Prefix-tuning (arXiv 2101.00190) as AdapterHub writes it: rows of keys and values, flat or made by a small network.

A flat tensor is [P, 2 L, kv_heads, head_dim]: the key of the l-th layer that has the prefix is at 2 l, the value at
2 l + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltaserve.deltas.adapters import Gate
from deltaserve.deltas.primitives import Prefix
from deltaserve.deltas.sites import Site
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.bottlenecks import gate
from deltaserve.formats.adapterhub.composition import Average, Block, Fuse, Stack
from deltaserve.formats.adapterhub.configs import Part, activation
from deltaserve.formats.adapterhub.member import Below, Member
from deltaserve.formats.draft import Draft
from deltaserve.formats.options import shown
from deltaserve_kernels.activations import activated

MOST_ROWS = 1 << 12
_MOST_INNER = 1 << 16
_ASKED = {"encoder_prefix": "encoder_prefix", "cross_prefix": "cross_prefix"}
"""Groups that a config may leave out, by their keys."""


@dataclass(frozen=True, eq=False)
class _Rows:
    keys: torch.Tensor
    values: torch.Tensor
    gate: Gate | None


def lower(members: Sequence[Member], block: Block, draft: Draft) -> None:
    """The rows of each attention; then what each layer's relative bias makes of them."""
    having = [member for member in members if member.of("prefix_tuning")]
    if not having:
        return
    draft.kind("prefix-tuning")
    found: dict[str, dict[str, _Rows]] = {}
    for member in having:
        for site, rows in _of(member).items():
            found.setdefault(site, {})[member.name] = rows
    made = {site: _stacked(block, rows, site) for site, rows in found.items()}
    spec = members[0].places.spec
    if spec.encoder_decoder:
        made = _biased(members[0], made)
    limit = spec.max_positions
    for site, prefix in made.items():
        if limit is not None and prefix.keys.shape[0] >= limit:
            raise BadCheckpoint(f"a prefix of {prefix.keys.shape[0]} rows; this backbone has {limit} positions")
        draft.put(site, prefix)


def _of(member: Member) -> dict[str, _Rows]:
    """By attention. Raises BadCheckpoint where two parts are for one."""
    _forget_copies(member.tensors)
    made: dict[str, _Rows] = {}
    places = member.places
    for part in member.of("prefix_tuning"):
        rows = part.integer("prefix_length", most=MOST_ROWS)
        groups: dict[str, list[Site]] = {}
        for group, site in places.attentions():
            layer = places.layer(site.name)
            asked = group not in _ASKED or part.flag(_ASKED[group])
            if asked and layer is not None and part.acts(layer):
                groups.setdefault(group, []).append(site)
        for group, sites in groups.items():
            whole = _whole(member, part, group, rows, sites)
            for at, site in enumerate(sites):
                if site.name in made:
                    raise BadCheckpoint(f"two prefixes of {shown(member.name)} are for {site.name!r}")
                keys, values = whole[:, 2 * at].contiguous(), whole[:, 2 * at + 1].contiguous()
                made[site.name] = _Rows(keys, values, _gate(member, part, site))
    return made


def _forget_copies(tensors: Below) -> None:
    """The library writes the whole prefix once more for each of its layers."""
    for name in tensors.names():
        if ".prefix_tuning.pool." in name and ".prefix_tunings." in name:
            tensors.drop(name)


def _whole(member: Member, part: Part, group: str, rows: int, sites: list[Site]) -> torch.Tensor:
    """[P, 2 L, kv_heads, head_dim]. The tensors say whether it is flat: the config does not after ejecting."""
    tensors, at = member.tensors, f"prefix_tuning.prefix_tunings.{member.name}.{group}"
    heads, width = sites[0].kv_heads, sites[0].head_dim
    shape = (rows, 2 * len(sites), heads, width)
    total = 2 * len(sites) * heads * width
    if tensors.has(f"{at}.control_trans"):
        return tensors.take(f"{at}.control_trans", (rows * total,)).view(shape)
    hidden = member.places.spec.hidden_size
    inner = part.integer("bottleneck_size", most=_MOST_INNER)
    first = f"{at}.control_trans.0"
    x = tensors.number(f"{at}.wte.weight", rows, hidden)
    x = x @ tensors.number(f"{first}.weight", inner, hidden).T + tensors.number(f"{first}.bias", inner)
    x = activated(x, activation(part.told))
    last = f"{at}.control_trans.2"
    x = x @ tensors.number(f"{last}.weight", total, inner).T + tensors.number(f"{last}.bias", total)
    return x.view(shape)


def _gate(member: Member, part: Part, site: Site) -> Gate | None:
    if not part.gated:
        return None
    places = member.places
    at = f"{places.below(site.name)}.prefix_tuning.prefix_gates.{member.name}"
    return gate(member, at, places.spec.hidden_size, 1 if part.flag("shared_gating") else 2, own="")


def _stacked(block: Block, rows: dict[str, _Rows], site: str) -> Prefix:
    """A later prefix of a Stack stands before the earlier ones."""
    match block:
        case Stack(children):
            for child in children:
                if isinstance(child, Fuse | Average) and any(name in rows for name in child.names()):
                    raise _refused(type(child).__name__, site)
            order = [name for name in reversed(block.names()) if name in rows]
        case Fuse() | Average():
            raise _refused(type(block).__name__, site)
        case _:
            order = list(rows)
    ordered = [rows[name] for name in order]
    if len(ordered) > 1 and any(each.gate is not None for each in ordered):
        raise options.not_served("use_gating", True, "several prefixes with gates of their own are not served")
    return Prefix(
        torch.cat([each.keys for each in ordered]),
        torch.cat([each.values for each in ordered]),
        gate=ordered[0].gate,
    )


def _refused(word: str, site: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the setup has prefixes in a block of type {word} at {site!r}; the library cannot run that",
        reason="KIND_NOT_SERVED",
        metadata={"type": word},
    )


def _biased(member: Member, made: dict[str, Prefix]) -> dict[str, Prefix]:
    """T5's relative bias, by what the library's forward does with it.

    The first layer's is for its prefix's P rows and the tokens behind them, while queries count from 0: prefix row p is
    at p − i, token j at P + j − i. It is handed on while prefixes are as long; from the first layer on where they are
    not, no layer of that stack has a bias. Cross-attention has none anyway.
    """
    result = dict(made)
    for group in ("encoder_prefix", "self_prefix"):
        sites = [site for found, site in member.places.attentions() if found == group]
        lengths = [made[site.name].keys.shape[0] if site.name in made else 0 for site in sites]
        lost = False
        for site, length in zip(sites, lengths, strict=True):
            lost = lost or length != lengths[0]
            if lost and site.name not in made:
                none = torch.zeros(0, site.kv_heads, site.head_dim)
                result[site.name] = Prefix(none, none, biased=False)
            elif site.name in made:
                prefix = made[site.name]
                result[site.name] = Prefix(
                    prefix.keys, prefix.values, tok=0 if lost else length, biased=not lost, gate=prefix.gate
                )
    return result
