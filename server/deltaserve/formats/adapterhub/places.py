"""Where the library puts things in each family: what a file's names mean, and what it takes for residual and norm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.deltas.adapters import Tap
from deltaserve.deltas.sites import BackboneSpec, Part, Site, SiteType, Sublayer
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.options import shown

KEYS: Mapping[Part, str] = {
    Part.ATTENTION: "mh_adapter",
    Part.FEED_FORWARD: "output_adapter",
    Part.CROSS_ATTENTION: "cross_adapter",
}
"""A sublayer's key in a config."""


@dataclass(frozen=True)
class Place:
    """The end of a sublayer. `module`: below what its tensors stand, as the library's base model calls it.

    `residual` is what the library takes for r, None: nothing. `norm` is the norm that it applies there to h + r, None:
    none; `other` says that it is not the sublayer's own. `hooked`: the model itself adds r, and norms, afterwards.
    """

    module: str
    sublayer: Sublayer
    residual: Tap | None
    norm: str | None
    other: bool = False
    hooked: bool = False

    @property
    def key(self) -> str:
        return KEYS[self.sublayer.part]


@dataclass(frozen=True)
class Layout:
    """One family. `below`: a place's module by its sublayer. `hooked`: by forward hooks, through an interface.

    `residual`: see Place. `sandwiched`: r's norm is the last layer's between its linear and its sum. `merged` ends
    the name of a linear that makes queries, keys and values at once. `middle` and `out` end those that
    intermediate_lora and output_lora are for. `refused`: methods that the library does not have here.
    """

    below: Callable[[Sublayer], str]
    middle: str
    out: str
    hooked: bool = False
    residual: Tap | None = Tap.RESIDUAL
    sandwiched: bool = False
    merged: str | None = None
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    refused: frozenset[str | None] = frozenset({"prompt_tuning"})


def layer_of(name: str) -> str:
    """The path of the layer that a module is in: to the first number in its name."""
    words = name.split(".")
    number = next((at for at, word in enumerate(words) if word.isdigit()), None)
    return "" if number is None else ".".join(words[: number + 1])


def _in_layer(sublayer: Sublayer) -> str:
    word = "attention_adapters" if sublayer.part is Part.ATTENTION else "output_adapters"
    return f"{layer_of(sublayer.last)}.{word}"


def _up(by: int) -> Callable[[Sublayer], str]:
    return lambda sublayer: sublayer.last.rsplit(".", by)[0]


_ENCODER = Layout(
    _up(1), "intermediate.dense", "output.dense", attention=("query", "key", "value"), refused=frozenset()
)
_LLAMA = Layout(_in_layer, "mlp.down_proj", "mlp.up_proj")
_HOOKED = Layout(
    _in_layer,
    "mlp.up_proj",
    "mlp.down_proj",
    hooked=True,
    refused=frozenset({"prompt_tuning", "prefix_tuning", "mtl_lora"}),
)
_SANDWICHED = Layout(_in_layer, _HOOKED.middle, _HOOKED.out, hooked=True, sandwiched=True, refused=_HOOKED.refused)
FAMILIES: Mapping[str, Layout] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "t5": Layout(
        _up(2), "DenseReluDense.wi", "DenseReluDense.wo", attention=("q", "k", "v"),
        refused=frozenset({"prompt_tuning", "reft"}),
    ),
    "gpt2": Layout(_in_layer, "mlp.c_fc", "mlp.c_proj", merged="attn.c_attn"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _HOOKED,
    "qwen3": _HOOKED,
    "gemma2": _SANDWICHED,
    "gemma3": _SANDWICHED,
    "modernbert": Layout(
        _in_layer, "mlp.Wi", "mlp.Wo", hooked=True, residual=Tap.INPUT, merged="attn.Wqkv", refused=_HOOKED.refused
    ),
}  # fmt: skip
"""Those that the library knows natively, and those that it has an interface for."""


class Places:
    """The family table at one backbone. Names of modules are those of the library's base model: without a prefix."""

    def __init__(self, spec: BackboneSpec, interface: Mapping[str, Any]) -> None:
        self.spec = spec
        self.layout = _layout(spec, interface)
        self._start = spec.prefix + "." if spec.prefix else ""
        layers = dict.fromkeys(layer for name in spec.modules if (layer := layer_of(name)))
        self._layers = {layer: number for number, layer in enumerate(layers)}

    @property
    def layers(self) -> int:
        """How many there are; an encoder-decoder's decoder goes on where its encoder ends."""
        return len(self._layers)

    def below(self, name: str) -> str:
        """A site's name in the library's base model."""
        return name.removeprefix(self._start)

    def layer(self, name: str) -> int | None:
        """The number of the layer that a site is in; None: it is in none."""
        return self._layers.get(layer_of(name))

    def bottlenecks(self) -> tuple[Place, ...]:
        """Where bottlenecks can stand, in the order of a forward. Raises FailedPrecondition where this is not known."""
        return tuple(self._place(sublayer) for sublayer in self.spec.sublayers)

    def ends(self) -> tuple[Sublayer, ...]:
        """The last sublayer of each layer, by its number."""
        last = {sublayer.layer: sublayer for sublayer in self.spec.sublayers}
        return tuple(last[layer] for layer in sorted(last))

    def linears(self) -> tuple[Site, ...]:
        """Every linear of a layer."""
        kinds = (SiteType.LINEAR, SiteType.CONV1D)
        return tuple(s for s in self.spec.sites.values() if s.type in kinds and self.layer(s.name) is not None)

    def location(self, site: Site) -> str | None:
        """`selfattn` with the matrix behind a dot, `intermediate` or `output`: which key of a config means a linear."""
        name, layout = site.name, self.layout
        if layout.merged is not None and name.endswith("." + layout.merged):
            return "selfattn.merged"
        last = name.rpartition(".")[2]
        if layout.merged is None and last in layout.attention and _attends(name, self.spec):
            return "selfattn." + "qkv"[layout.attention.index(last)]
        if name.endswith("." + layout.out) and not name.endswith(".attention.output.dense"):
            return "output"
        # Of T5's gated feed-forward the library takes the second.
        middle = layout.middle + ("_1" if f"{name.rpartition('.')[0]}.wi_1" in self.spec.sites else "")
        return "intermediate" if name.endswith("." + middle) else None

    def attentions(self) -> tuple[tuple[str, Site], ...]:
        """Each attention, and which group of a prefix is for it, in the order of the library's layers."""
        return tuple((_group(s.name, self.spec), s) for s in self.spec.sites.values() if s.type is SiteType.ATTENTION)

    def _place(self, sublayer: Sublayer) -> Place:
        layout = self.layout
        module = self.below(layout.below(sublayer))
        if not layout.hooked:
            return Place(module, sublayer, Tap.RESIDUAL, sublayer.norm if sublayer.post else None)
        norm = None
        if layout.sandwiched:
            # Whichever the layer, the library's closure finds the last one's.
            norm = next(s for s in reversed(self.spec.sublayers) if s.part is sublayer.part).sandwich
        elif layout.residual is Tap.INPUT and sublayer.part is Part.ATTENTION:
            norm = next(s for s in reversed(self.spec.sublayers) if s.part is Part.FEED_FORWARD).norm
        return Place(module, sublayer, layout.residual, norm, other=norm is not None, hooked=True)


def _attends(name: str, spec: BackboneSpec) -> bool:
    parent = spec.sites.get(name.rpartition(".")[0])
    return parent is not None and parent.type is SiteType.ATTENTION


def _group(name: str, spec: BackboneSpec) -> str:
    if not spec.encoder_decoder:
        return "self_prefix"
    if name.startswith("encoder."):
        return "encoder_prefix"
    return "cross_prefix" if "EncDecAttention" in name else "self_prefix"


def _layout(spec: BackboneSpec, interface: Mapping[str, Any]) -> Layout:
    own = FAMILIES.get(spec.family)
    if own is None:
        return _by_hand(spec, interface)
    return own


_WORDS: tuple[str, ...] = (
    "layer_self_attn",
    "attn_o_proj",
    "layer_intermediate_proj",
    "layer_output_proj",
    "layer_pre_self_attn",
)
_WORDS += ("layer_pre_ffn", "layer_ln_1", "layer_ln_2", "attn_qkv_proj", "attn_q_proj", "attn_k_proj", "attn_v_proj")


def _by_hand(spec: BackboneSpec, interface: Mapping[str, Any]) -> Layout:
    """What an adapter_interface.json says, if it is this family's own shape: its words are compared, never followed."""
    told = interface.get("interface")
    if not isinstance(told, dict):
        raise FailedPrecondition(
            f"AdapterHub's library has no {spec.family} of its own, and the checkpoint has no adapter_interface.json "
            "that says what its names mean",
            reason="KIND_NOT_SERVED",
            metadata={"family": spec.family},
        )
    words = {key: told.get(key) for key in _WORDS}
    for key, value in words.items():
        if not isinstance(value, str | None):
            raise BadCheckpoint(f"adapter_interface.json: {key!r} is {shown(value)}; a module's name is expected")
    if words["layer_ln_1"] is not None or words["layer_ln_2"] is not None:
        raise _foreign(spec, "layer_ln_1 and layer_ln_2 name norms behind the sublayers")
    tap = _residual(spec, words)
    merged = words["attn_qkv_proj"]
    heads = tuple(str(words[f"attn_{matrix}_proj"]) for matrix in "qkv")
    return Layout(
        _in_layer,
        str(words["layer_intermediate_proj"]),
        str(words["layer_output_proj"]),
        hooked=True,
        residual=tap,
        merged=None if merged is None else f"{words['layer_self_attn']}.{merged}",
        attention=heads,
        refused=_HOOKED.refused,
    )


def _residual(spec: BackboneSpec, words: Mapping[str, Any]) -> Tap | None:
    """What r is, if the interface's ends are those of this backbone's sublayers."""
    found: set[Tap | None] = set()
    for sublayer in spec.sublayers:
        attends = sublayer.part is Part.ATTENTION
        last = f"{words['layer_self_attn']}.{words['attn_o_proj']}" if attends else words["layer_output_proj"]
        before = words["layer_pre_self_attn" if attends else "layer_pre_ffn"]
        layer = layer_of(sublayer.last)
        if f"{layer}.{last}" != sublayer.last:
            raise _foreign(spec, f"no sublayer of this backbone ends at {shown(last)}")
        if sublayer.post:
            raise _foreign(spec, "its norms stand behind its sublayers")
        if before is None:
            found.add(None)
        elif f"{layer}.{before}" == sublayer.norm:
            found.add(Tap.RESIDUAL)
        elif f"{layer}.{before}" in sublayer.first or any(f.startswith(f"{layer}.{before}.") for f in sublayer.first):
            found.add(Tap.INPUT)
        else:
            raise _foreign(spec, f"{shown(before)} is not what stands before a sublayer")
    if len(found) > 1:
        raise _foreign(spec, "its sublayers have unlike residuals")
    return found.pop() if found else None


def _foreign(spec: BackboneSpec, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"adapter_interface.json describes {spec.family} in a way that is not served: {why}",
        reason="OPTION_NOT_SERVED",
        metadata={"key": "interface"},
    )
