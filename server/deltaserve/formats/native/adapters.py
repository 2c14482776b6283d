"""Which adapters may stand at a linear, with which shapes: as wide as what they tap, and as what they give to."""

from deltaserve.deltas.adapters import Bottleneck, Coupling, Fusion, Gate, Net, OwnNorm, Positions, Tap
from deltaserve.deltas.sites import BackboneSpec, Site, SiteType
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.native.shapes import tensor
from deltaserve_kernels.activations import ACTIVATIONS

_ANYWHERE = (Tap.OUTPUT, Tap.OWN)
"""What can be tapped where no sublayer ends."""


def bottleneck(found: Bottleneck, site: Site, spec: BackboneSpec, place: str) -> None:
    """Its tensors fit what it taps at this site. Raises BadCheckpoint with the field at fault."""
    taps = [found.input] if found.carry is None else [found.input, found.carry]
    _stands(taps, found.replaces, found.norm, site, spec, place)
    _network(found, site, spec, place)
    if found.carry is not None:
        _wide(found.carry, site, spec, f"{place}.carry")
    if found.after is not None:
        _norm(found.after, site.out_features, f"{place}.after")
    if found.gate is not None:
        gate(found.gate, _width(found.input, site, spec), f"{place}.gate")
    if found.positions is not None:
        _positions(found.positions, f"{place}.positions")


def fusion(found: Fusion, site: Site, spec: BackboneSpec, place: str) -> None:
    """Its matrices and its members' tensors fit what they tap at this site. Raises BadCheckpoint."""
    if not found.members:
        raise BadCheckpoint(f"{place}.members is empty; at least one is expected")
    carried = () if found.carry is None else (found.carry,)
    taps = [found.query_tap, *carried, *(member.input for member in found.members)]
    _stands(taps, found.replaces, found.norm, site, spec, place)
    for index, member in enumerate(found.members):
        _network(member, site, spec, f"{place}.members.{index}")
    for tap in (found.query_tap, *carried):
        _wide(tap, site, spec, place)
    width = site.out_features
    for name, weight in (("query", found.query), ("key", found.key), ("value", found.value)):
        if weight is not None:
            tensor(weight, (width, width), f"{place}.{name}")
    for name, bias in (("query_bias", found.query_bias), ("key_bias", found.key_bias)):
        if bias is not None:
            tensor(bias, (width,), f"{place}.{name}")
    if found.after is not None:
        _norm(found.after, width, f"{place}.after")


def coupling(found: Coupling, spec: BackboneSpec, place: str) -> None:
    """Its networks turn one half of an embedded row into the other. Raises BadCheckpoint."""
    if spec.hidden_size % 2:
        raise BadCheckpoint(f"{place}: rows of {spec.hidden_size} numbers have no halves")
    for name, net in (("f", found.f), ("g", found.g)):
        _net(net, spec.hidden_size // 2, f"{place}.{name}")


def gate(found: Gate, width: int, place: str) -> None:
    """It reads rows of this width. Raises BadCheckpoint."""
    tensor(found.weight, (None, width), f"{place}.weight")
    if found.bias is not None:
        tensor(found.bias, (found.weight.shape[0],), f"{place}.bias")


def _stands(taps: list[Tap], replaces: bool, norm: str | None, site: Site, spec: BackboneSpec, place: str) -> None:
    """What it taps is there: the stream beside a site is known where a sublayer ends."""
    ends = next((sublayer for sublayer in spec.sublayers if site.name in (sublayer.last, sublayer.sandwich)), None)
    beside = [tap.value for tap in taps if tap not in _ANYWHERE]
    if ends is None and (beside or replaces or norm is not None):
        what = f"taps {beside[0]!r}" if beside else "replaces the stream"
        raise BadCheckpoint(f"{place} {what}, and no sublayer of this backbone ends at {site.name!r}")
    if norm is not None and (norm not in spec.sites or spec.sites[norm].type is not SiteType.NORM):
        raise BadCheckpoint(f"{place}.norm is {norm[:80]!r}, which is no norm of this backbone")
    if norm is not None and spec.sites[norm].out_features != spec.hidden_size:
        raise BadCheckpoint(f"{place}.norm is {norm[:80]!r}, which is a norm of heads")


def _width(tap: Tap, site: Site, spec: BackboneSpec) -> int:
    if tap is Tap.OWN:
        return site.in_features
    return site.out_features if tap is Tap.OUTPUT else spec.hidden_size


def _wide(tap: Tap, site: Site, spec: BackboneSpec, place: str) -> None:
    width = _width(tap, site, spec)
    if width != site.out_features:
        raise BadCheckpoint(f"{place} taps {tap.value!r}, {width} numbers wide; the site gives {site.out_features}")


def _network(found: Bottleneck, site: Site, spec: BackboneSpec, place: str) -> None:
    """Down, activation, up, and the norm before."""
    width = _width(found.input, site, spec)
    tensor(found.down, (None, width), f"{place}.down")
    inner = found.down.shape[0]
    tensor(found.up, (site.out_features, inner), f"{place}.up")
    for name, bias, size in (("down_bias", found.down_bias, inner), ("up_bias", found.up_bias, site.out_features)):
        if bias is not None:
            tensor(bias, (size,), f"{place}.{name}")
    activation(found.activation, f"{place}.activation")
    if found.before is not None:
        _norm(found.before, width, f"{place}.before")


def _net(found: Net, half: int, place: str) -> None:
    tensor(found.down, (None, half), f"{place}.down")
    inner = found.down.shape[0]
    for name, part, shape in (
        ("down_bias", found.down_bias, (inner,)),
        ("up", found.up, (half, inner)),
        ("up_bias", found.up_bias, (half,)),
    ):
        tensor(part, shape, f"{place}.{name}")
    activation(found.activation, f"{place}.activation")


def _norm(found: OwnNorm, width: int, place: str) -> None:
    for name, part in (("weight", found.weight), ("bias", found.bias)):
        tensor(part, (width,), f"{place}.{name}")
    if not 0 < found.eps <= 1:
        raise BadCheckpoint(f"{place}.eps is {found.eps}; a small number above 0 is expected")


def _positions(found: Positions, place: str) -> None:
    if found.first < 0 or found.last < 0 or not found.first + found.last:
        raise BadCheckpoint(f"{place} is the first {found.first} and the last {found.last} rows; that is none")


def activation(name: str | None, place: str) -> None:
    if name is not None and name not in ACTIVATIONS:
        raise BadCheckpoint(f"{place} is {name[:80]!r}; this release knows {', '.join(ACTIVATIONS)}")
