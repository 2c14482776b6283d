"""Which modules a config means, where that can be told by comparing names: its patterns are never compiled.

Names are those of the backbone, or of the library's common structure, in which every family's attention is `attn@`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deltaserve.formats import options
from deltaserve.formats.opendelta.checkpoint import Checkpoint

_PATTERN = "[r]"
_LEFT_OUT = ("lm_head",)


@dataclass(frozen=True)
class Stack:
    """Layers `path`.0, `path`.1 and so on, which the common structure calls `common`.0; and what is inside of each.

    `also`: other names that a module has there.
    """

    path: str
    common: str
    inside: Mapping[str, str]
    also: Mapping[str, str] | None = None


def _attention(path: str, q: str, k: str, v: str, proj: str) -> dict[str, str]:
    inner = {q: "q@", k: "k@", v: "v@", proj: "proj@"}
    return {path: "attn@", **{f"{path}.{own}": f"attn@.{common}" for own, common in inner.items()}}


def _t5(stack: str) -> Stack:
    inside = _attention("layer.0", *(f"SelfAttention.{word}" for word in "qkvo"))
    norms = {"layer.0": "attn@", "layer.1": "ff@"}
    feeding = "layer.1"
    if stack == "decoder":
        cross = _attention("layer.1", *(f"EncDecAttention.{word}" for word in "qkvo"))
        inside |= {path: f"cross{name}" for path, name in cross.items()}
        norms, feeding = {"layer.0": "attn@", "layer.1": "crossattn@", "layer.2": "ff@"}, "layer.2"
    inside |= {feeding: "ff@", f"{feeding}.DenseReluDense.wi": "ff@.w1@", f"{feeding}.DenseReluDense.wo": "ff@.w2@"}
    inside |= {f"{path}.layer_norm": f"{common}.layer_norm@" for path, common in norms.items()}
    return Stack(f"{stack}.block", f"{stack}@.block@", inside)


_ENCODER = Stack(
    "encoder.layer",
    "encoder@.block@",
    {
        **_attention("attention", "self.query", "self.key", "self.value", "output.dense"),
        "attention.output.LayerNorm": "attn@.layer_norm@",
        "output": "ff@",
        "output.dense": "ff@.w2@",
        "output.LayerNorm": "ff@.layer_norm@",
        "intermediate": "ff@",
        "intermediate.dense": "ff@.w1@",
    },
)
_GPT2 = Stack(
    "h",
    "decoder@.block@",
    {
        "attn": "attn@",
        "attn.c_attn": "attn@.q,k,v@",
        "attn.c_proj": "attn@.proj@",
        "ln_1": "attn@.layer_norm@",
        "mlp": "ff@",
        "mlp.c_fc": "ff@.w1@",
        "mlp.c_proj": "ff@.w2@",
        "ln_2": "ff@.layer_norm@",
    },
)
_OPT = Stack(
    "decoder.layers",
    "decoder@.block@",
    {
        **_attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        "self_attn_layer_norm": "layer_norm@",
        "fc1": "ff@.w1@",
        "fc2": "ff@.w2@",
        "final_layer_norm": "layer_norm@",
    },
    {"fc1": "ff@", "fc2": "ff@"},
)
STACKS: Mapping[str, tuple[Stack, ...]] = {
    "bert": (_ENCODER,),
    "roberta": (_ENCODER,),
    "t5": (_t5("encoder"), _t5("decoder")),
    "gpt2": (_GPT2,),
    "opt": (_OPT,),
}
_ALONE: Mapping[str, Mapping[str, str]] = {
    "t5": {f"{stack}.final_layer_norm": f"{stack}@.layer_norm@" for stack in ("encoder", "decoder")},
    "gpt2": {"ln_f": "decoder@.layer_norm@"},
}
"""What stands outside of layers."""


def wanted(checkpoint: Checkpoint, default: tuple[str, ...]) -> tuple[str, ...]:
    """The config's own list of modules, or the method's."""
    return options.listed(checkpoint.config, "modified_modules") or default


def modules(checkpoint: Checkpoint, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The modules whose names end with one of these, in the order of the model; None: it cannot be told."""
    config, family = checkpoint.config, checkpoint.backbone.family
    common = options.flag(config, "common_structure") or not config.get("modified_modules")
    if any(name.startswith(_PATTERN) for name in names) or (common and family not in STACKS):
        checkpoint.warn(
            "config key 'modified_modules' has patterns, which are never compiled, or names that the library has no "
            "meaning for in this family: where the tensors stand is where the delta acts"
        )
        return None
    left_out = tuple(options.listed(config, "exclude_modules")) or _LEFT_OUT
    found = []
    for module in checkpoint.backbone.modules:
        if module.startswith(left_out) or checkpoint.bare(module).startswith(left_out):
            continue
        known = _common(family, checkpoint.bare(module)) if common else ()
        if any(name == own or name.endswith("." + own) for name in (known or (module,)) for own in names):
            found.append(module)
    return tuple(found)


def _common(family: str, bare: str) -> tuple[str, ...]:
    """The names that a module has in the common structure; none where it has its own alone."""
    return tuple(_named(family, bare))


def _named(family: str, bare: str) -> Iterator[str]:
    alone = _ALONE.get(family, {})
    if bare in alone:
        yield alone[bare]
    for stack in STACKS[family]:
        if bare.startswith(stack.path + "."):
            number, _, inner = bare.removeprefix(stack.path + ".").partition(".")
            for names in (stack.inside, stack.also or {}):
                if inner in names:
                    yield f"{stack.common}.{number}.{names[inner]}"
