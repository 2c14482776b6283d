"""The modules that a checkpoint targets, one by one; what every tuner has in common."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.deltas.sites import Site, SiteType, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.ledger import SHOWN
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.matching import Patterns, targeted


@dataclass(frozen=True)
class Target:
    """One targeted module, mostly a linear layer. `own` is the checkpoint's name for it."""

    checkpoint: Checkpoint
    draft: Draft
    patterns: Patterns
    own: str
    name: str
    site: Site

    @property
    def inputs(self) -> int:
        return self.site.in_features

    @property
    def outputs(self) -> int:
        return self.site.out_features

    def has(self, part: str) -> bool:
        return self.checkpoint.has(f"{self.name}.{part}")

    def shape(self, part: str) -> tuple[int, ...]:
        """Of a tensor that may be missing: then ()."""
        return self.checkpoint.shape(f"{self.name}.{part}") if self.has(part) else ()

    def take(self, part: str, *shape: int) -> torch.Tensor:
        """A tensor of this module as it is in the file; see `Checkpoint.take`."""
        return self.checkpoint.take(f"{self.name}.{part}", shape)

    def number(self, part: str, *shape: int) -> torch.Tensor:
        """The same in fp32, for arithmetic."""
        return self.take(part, *shape).float()

    def setting(self, table: dict[str, Any], key: str, otherwise: Any) -> Any:
        """What a config's table of patterns says of this module."""
        found = self.patterns.first(table, self.own, key)
        return otherwise if found is None else found


Lower = Callable[[Checkpoint, Draft, Weights], None]
Each = Callable[[Target, Weights], None]


LINEARS = (SiteType.LINEAR, SiteType.CONV1D)
WEIGHTS = (*LINEARS, SiteType.EMBEDDING)


def each(kind: str, lower: Each, word: str = "", types: tuple[SiteType, ...] = LINEARS) -> Lower:
    """A tuner that treats each targeted module alike; `types` are those that it can be at.

    With `word`, its config's `bias` may be none, all or `<word>_only`.
    """

    def whole(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
        draft.kind(kind)
        found = list(targets(checkpoint, draft, types))
        for target in checkpoint.work.steps(found):
            lower(target, weights)
            _same_weight(target, weights)
        biases(checkpoint, draft, found, word)

    return whole


def targets(
    checkpoint: Checkpoint, draft: Draft, types: tuple[SiteType, ...] = LINEARS, also: tuple[str, ...] = ()
) -> Iterator[Target]:
    """In the model's order, those that the config does not name last; `also` has canonical names.

    Raises BadCheckpoint where nothing is targeted, or what is not of `types`.
    """
    patterns = Patterns()
    matched = targeted(checkpoint.config, checkpoint.modules, patterns)
    for entry in matched.idle[:SHOWN]:
        checkpoint.warn(f"target_modules entry {options.shown(entry)} matches no module here")
    unnamed = tuple(own for own in map(checkpoint.own, also) if own not in matched.modules)
    for own in (*matched.modules, *unnamed):
        module = checkpoint.name(own)
        if not checkpoint.may_lack(module):
            yield Target(checkpoint, draft, patterns, own, module, _site(checkpoint, module, types))


def own_weight(target: Target, weights: Weights) -> torch.Tensor | None:
    """The weight that PEFT saves with a targeted lm_head or embed_tokens; None where it is none, or the backbone's."""
    if not target.has("base_layer.weight"):
        return None
    ours = weights(target.name)
    saved = target.take("base_layer.weight", *ours.shape)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return None if any(torch.equal(saved.to(kind).float(), ours) for kind in kinds) else saved


def _same_weight(target: Target, weights: Weights) -> None:
    if own_weight(target, weights) is not None:
        raise BadCheckpoint(
            f"tensor {target.name}.base_layer.weight is not this backbone's weight there, which the delta changes: "
            "was it made for another one?",
            metadata={"tensor": f"{target.name}.base_layer.weight"},
        )


def parameters(checkpoint: Checkpoint, draft: Draft) -> Iterator[Target]:
    """The linear layers and embeddings whose weight `target_parameters` names, in the model's order."""
    wanted = options.listed(checkpoint.config, "target_parameters")
    met: set[str] = set()
    patterns = Patterns()
    for own in checkpoint.modules:
        key = f"{own}.weight"
        entries = [name for name in wanted if key == name or key.endswith(f".{name}")]
        module = checkpoint.name(own)
        if entries and not checkpoint.may_lack(module):
            yield Target(
                checkpoint, draft, patterns, own, module, _site(checkpoint, module, WEIGHTS, "target_parameters")
            )
        met.update(entries)
    strays = sorted(set(wanted) - met)
    if strays:
        raise options.not_served(
            "target_parameters",
            strays[0],
            "no linear layer or embedding here has a weight of this name; parameters of three dimensions are those of "
            "mixtures of experts, and no such family is served",
        )


def biases(checkpoint: Checkpoint, draft: Draft, found: list[Target], word: str) -> None:
    """Trained biases: a checkpoint holds them whole, a delta holds the difference to the backbone's."""
    if not word:
        return
    which = options.choice(checkpoint.config, "bias", ("none", "all", f"{word}_only"))
    if which == "none":
        return
    for target in found:
        if target.site.bias is not None:
            _bias(checkpoint, draft, target.name, f"{target.name}.base_layer.bias")
    if which == "all":
        other_biases(checkpoint, draft)


def other_biases(checkpoint: Checkpoint, draft: Draft) -> None:
    """Those of modules that are not targeted, which `bias: all` trains too."""
    for name in checkpoint.backbone.sites:
        if checkpoint.has(f"{name}.bias"):
            _bias(checkpoint, draft, name, f"{name}.bias")


def _bias(checkpoint: Checkpoint, draft: Draft, module: str, name: str) -> None:
    before = checkpoint.backbone.sites[module].bias
    if before is None:
        raise BadCheckpoint(f"tensor {name!r} is a bias, and {module!r} has none here", metadata={"tensor": name})
    after = checkpoint.take(name, tuple(before.shape)).float()
    if not torch.equal(after, before):
        draft.kind("bias")
        draft.shift(module, after - before)


def _site(checkpoint: Checkpoint, module: str, types: tuple[SiteType, ...], key: str = "target_modules") -> Site:
    site = checkpoint.backbone.sites.get(module)
    if site is not None and site.type in types:
        return site
    expected = " or ".join(sorted({kind.value for kind in types}))
    what = "no layer with weights" if site is None else f"of type {site.type}"
    raise BadCheckpoint(
        f"config key {key!r} means {module!r}, which is {what} here; expected is {expected}",
        metadata={"module": module},
    )
