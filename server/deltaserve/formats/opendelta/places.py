"""Where in the backbone a module's output is, and what it gets: the library hangs adapters on any module at all."""

from dataclasses import dataclass

from deltaserve.deltas.adapters import Tap
from deltaserve.deltas.sites import BackboneSpec, SiteType, Sublayer
from deltaserve.errors import FailedPrecondition
from deltaserve.formats.opendelta.checkpoint import unserved
from deltaserve.formats.options import shown

LINEAR = (SiteType.LINEAR, SiteType.CONV1D)
_FEEDING = {
    "attention.self": "attention.output.dense",
    "intermediate": "output.dense",
}
"""Modules of an encoder's layer whose output a linear gets and nothing else does, and which one that is."""
_ENCODERS = ("bert", "roberta")


@dataclass(frozen=True)
class Place:
    """`output`: what of the site the module gives. `input`: what the module gets; None: nothing that a site can tap.

    With `output` OWN the module gives what the site, a linear, gets.
    """

    site: str
    output: Tap
    input: Tap | None

    @property
    def replaces(self) -> bool:
        """Whether it gives the stream behind a sublayer, and not what is added to it."""
        return self.output in (Tap.SUM, Tap.NORMED)

    def width(self, tap: Tap, spec: BackboneSpec) -> int:
        """How wide what is tapped at its site is."""
        site = spec.sites[self.site]
        own = {Tap.OUTPUT: site.out_features, Tap.OWN: site.in_features}
        return own.get(tap, spec.hidden_size)


def place(spec: BackboneSpec, module: str) -> Place:
    """Raises BadCheckpoint for a module that is not there, FailedPrecondition for one that no site stands for."""
    if module not in spec.modules:
        raise unserved(module, "this backbone has no such module")
    site = spec.sites.get(module)
    if site is not None and site.type in LINEAR:
        return Place(module, Tap.OUTPUT, Tap.OWN)
    for sublayer in spec.sublayers:
        if sublayer.norm == module and sublayer.post:
            return Place(sublayer.last, Tap.NORMED, Tap.SUM)
    if site is not None and site.type is SiteType.NORM and site.out_features == spec.hidden_size:
        return Place(module, Tap.OUTPUT, Tap.OWN)
    for feeding, fed in _FEEDING.items():
        layer = module.removesuffix(f".{feeding}")
        if spec.family in _ENCODERS and layer != module and f"{layer}.{fed}" in spec.sites:
            return Place(f"{layer}.{fed}", Tap.OWN, None)
    inside = [sublayer for sublayer in spec.sublayers if sublayer.last.startswith(module + ".")]
    if site is not None and site.type is not SiteType.ATTENTION:
        inside = []
    if not inside or len({sublayer.layer for sublayer in inside}) > 1 or not module.startswith(_layer(inside[0])):
        raise not_there(module)
    return _behind(module, inside)


def pair(spec: BackboneSpec, first: str, second: str) -> Place:
    """What the second gives, and of the first what it gets. Raises BadCheckpoint, FailedPrecondition."""
    behind = place(spec, second)
    if first == second:
        return behind
    for sublayer in spec.sublayers:
        if first in sublayer.first and sublayer.last == behind.site:
            return Place(behind.site, behind.output, Tap.INPUT)
    raise FailedPrecondition(
        f"an adapter from the input of {shown(first)} to the output of {shown(second)}: this release serves those from "
        "a sublayer's first linear to its last, or around one module",
        reason="OPTION_NOT_SERVED",
        metadata={"module": first[:200]},
    )


def not_there(module: str) -> FailedPrecondition:
    """The error for an adapter where none can stand."""
    return FailedPrecondition(
        f"tensors stand below {shown(module)}; this release serves adapters on linear layers and norms, on attentions "
        "and feed-forwards, and on whole layers, where their norms and residuals are known",
        reason="OPTION_NOT_SERVED",
        metadata={"module": module[:200]},
    )


def _behind(module: str, inside: list[Sublayer]) -> Place:
    last = inside[-1]
    within = [name.startswith(module + ".") for name in last.first]
    if not last.norm.startswith(module + "."):
        return Place(last.last, Tap.OUTPUT, Tap.INPUT if all(within) and len(inside) == 1 else None)
    if last.sandwich is not None:
        raise not_there(module)
    gets = Tap.RESIDUAL if all(within) else None if any(within) else Tap.OWN
    return Place(last.last, Tap.NORMED if last.post else Tap.SUM, gets if len(inside) == 1 else None)


def _layer(sublayer: Sublayer) -> str:
    """The path of its layer: to the first number in a name."""
    words = sublayer.last.split(".")
    number = next(at for at, word in enumerate(words) if word.isdigit())
    return ".".join(words[: number + 1])
