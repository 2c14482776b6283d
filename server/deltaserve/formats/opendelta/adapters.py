"""OpenDelta's networks on modules: adapters of four kinds, each a Bottleneck, and LoRA.

Adapter (arXiv 1902.00751), Compacter and its low-rank baseline (2106.04647): y' = y + A(y), y what a module gives,
before dropout, residual and norm unless the module has these inside. Parallel adapter (2110.04366): y2' = y2 + A(u1),
u1 what the first module of a pair gets. LoRA (2106.09685): y' = y + (lora_alpha / lora_r) B A u.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from deltaserve.deltas.adapters import Bottleneck, Tap
from deltaserve.deltas.primitives import Dense, LowRank
from deltaserve.deltas.sites import SiteType
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.activations import activation
from deltaserve.formats.draft import Draft
from deltaserve.formats.kronecker import expanded, joined
from deltaserve.formats.opendelta import targets
from deltaserve.formats.opendelta.checkpoint import Checkpoint, unserved
from deltaserve.formats.opendelta.places import Place, not_there, pair, place

_ACTIVATIONS: Mapping[str, str | None] = {
    "swish": "silu",
    "leakyrelu": "leaky_relu",
    "gelu_new": "gelu_tanh",
    "gelu_orig": "gelu",
}
"""The library's own names; all others are transformers'."""

SEQUENTIAL = ("attn@.proj@", "ff@.w2@")
PARALLEL = ("attn@", "attn@", "ff@.w1@", "ff@.w2@")
LORA = ("attn@.q@", "attn@.v@")

ADAPTER_OPTIONS = options.Options(used=frozenset({"bottleneck_dim", "non_linearity"}))
PARALLEL_OPTIONS = options.Options(
    used=frozenset({"bottleneck_dim", "non_linearity"}),
    # The library's model is never told of it: its scale is always 1.
    inert=frozenset({"scaled"}),
)
LOW_RANK_OPTIONS = options.Options(
    used=frozenset({"reduction_factor", "non_linearity", "low_rank_rank"}), inert=frozenset({"low_rank_w_init"})
)
COMPACTER_OPTIONS = options.Options(
    used=frozenset(
        {"reduction_factor", "non_linearity", "hypercomplex_division", "factorized_phm", "factorized_phm_rule"}
        | {"phm_rank", "learn_phm", "use_bias_up_sampler", "use_bias_down_sampler"}
    ),
    inert=frozenset(
        {"bottleneck_dim", "sequential", "phm_c_init", "hypercomplex_nonlinearity", "phm_init_range", "kronecker_prod"}
    ),
    refused={
        key: "the library shares no such tensors between modules: it refuses this option itself"
        for key in ("shared_phm_rule", "shared_W_phm")
    },
)
LORA_OPTIONS = options.Options(used=frozenset({"lora_r", "lora_alpha"}), inert=frozenset({"lora_dropout"}))


@dataclass(frozen=True, eq=False)
class Network:
    """Down [b, d] and up [d, b] as a linear has them, with their biases."""

    down: torch.Tensor
    down_bias: torch.Tensor | None
    up: torch.Tensor
    up_bias: torch.Tensor | None


Read = Callable[[Checkpoint, str, int], Network]


def adapter(checkpoint: Checkpoint, draft: Draft) -> None:
    _sequential(checkpoint, draft, "adapter", "adapter", _plain, "gelu_new")


def compacter(checkpoint: Checkpoint, draft: Draft) -> None:
    """Weights are sums of Kronecker products of a rule and small matrices; each linear has a rule of its own."""
    _sequential(checkpoint, draft, "compactor", "compacter", _hypercomplex, "relu")


def low_rank_adapter(checkpoint: Checkpoint, draft: Draft) -> None:
    """Weights are products of a column and a row."""
    rank = options.integer(checkpoint.config, "low_rank_rank", 1)
    if rank > 1:
        raise FailedPrecondition(
            f"config key 'low_rank_rank' is {rank}: the library multiplies the two factors number by number, which "
            "fails for more than one row",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "low_rank_rank"},
        )
    _sequential(checkpoint, draft, "low_rank_adapter", "low-rank-adapter", _product, "gelu_new")


def parallel_adapter(checkpoint: Checkpoint, draft: Draft) -> None:
    """Its tensors stand below the first module of a pair: the config, or what is usual, names the second."""
    draft.kind("parallel-adapter")
    word, spec = "parallel_adapter", checkpoint.backbone
    function = _activation(checkpoint, "gelu_new")
    pairs = _pairs(checkpoint)
    _all_there(checkpoint, word, None if pairs is None else tuple(pairs))
    for module in checkpoint.work.steps(checkpoint.found[word]):
        second = _usual(checkpoint, module) if pairs is None else pairs[module]
        behind = pair(spec, module, second)
        if behind.input is None:
            raise not_there(module)
        _put(checkpoint, draft, behind, behind.input, _plain, f"{module}.{word}.", function)


def lora(checkpoint: Checkpoint, draft: Draft) -> None:
    draft.kind("lora")
    rank = options.integer(checkpoint.config, "lora_r", 8)
    scale = options.number(checkpoint.config, "lora_alpha", 16.0) / rank
    _all_there(checkpoint, "lora", targets.modules(checkpoint, targets.wanted(checkpoint, LORA)))
    for module in checkpoint.work.steps(checkpoint.found["lora"]):
        site = checkpoint.backbone.sites.get(module)
        if site is None or site.type is not SiteType.LINEAR:
            raise unserved(module, "this backbone has no such linear layer, and the library puts LoRA at no other")
        a = checkpoint.take(f"{module}.lora.lora_A", (rank, site.in_features))
        b = checkpoint.take(f"{module}.lora.lora_B", (site.out_features, rank))
        draft.put(module, LowRank(a, b, scale))


def _sequential(checkpoint: Checkpoint, draft: Draft, word: str, kind: str, read: Read, usual: str) -> None:
    draft.kind(kind)
    function = _activation(checkpoint, usual)
    _all_there(checkpoint, word, targets.modules(checkpoint, targets.wanted(checkpoint, SEQUENTIAL)))
    for module in checkpoint.work.steps(checkpoint.found[word]):
        behind = place(checkpoint.backbone, module)
        _put(checkpoint, draft, behind, behind.output, read, f"{module}.{word}.", function)


def _put(
    checkpoint: Checkpoint, draft: Draft, behind: Place, tap: Tap, read: Read, start: str, function: str | None
) -> None:
    width = behind.width(tap, checkpoint.backbone)
    found = read(checkpoint, start, width)
    if behind.width(behind.output, checkpoint.backbone) != width:
        raise BadCheckpoint(f"tensors below {start!r} give {width} numbers, and what they are added to has others")
    if behind.output is Tap.OWN:
        found = _fed(found, _weight(checkpoint, draft, behind.site))
    draft.put(
        behind.site,
        Bottleneck(
            found.down,
            found.up,
            found.down_bias,
            found.up_bias,
            function,
            input=tap,
            carry=Tap.OUTPUT if behind.output is Tap.OWN else behind.output,
            replaces=behind.replaces,
        ),
    )


def _fed(found: Network, weight: torch.Tensor) -> Network:
    """W (x + A(x)) + b = (W x + b) + W A(x): up and its bias, fp32, for the output of the linear that gets x."""
    up = weight.double() @ found.up.double()
    bias = None if found.up_bias is None else (weight.double() @ found.up_bias.double()).float()
    return Network(found.down, found.down_bias, up.float(), bias)


def _weight(checkpoint: Checkpoint, draft: Draft, site: str) -> torch.Tensor:
    """A linear's weight [out, in], the checkpoint's own where it has one."""
    own = (part.weight for part in draft.at.get(site, ()) if isinstance(part, Dense) and part.replace)
    found = next(own, None)
    return checkpoint.weights(site) if found is None else found


def _plain(checkpoint: Checkpoint, start: str, width: int) -> Network:
    inner = options.integer(checkpoint.config, "bottleneck_dim", 24)
    down, up = (f"{start}modulelist.{name}_proj" for name in ("down", "up"))
    return Network(
        checkpoint.take(f"{down}.weight", (inner, width)),
        checkpoint.take(f"{down}.bias", (inner,)),
        checkpoint.take(f"{up}.weight", (width, inner)),
        checkpoint.take(f"{up}.bias", (width,)),
    )


def _product(checkpoint: Checkpoint, start: str, width: int) -> Network:
    inner = _reduced(checkpoint, width, 32)

    def one(name: str, rows: int, columns: int) -> torch.Tensor:
        left = checkpoint.take(f"{start}{name}.W_left", (rows, 1)).float()
        return (left * checkpoint.take(f"{start}{name}.W_right", (1, columns)).float()).T.contiguous()

    return Network(
        one("down_sampler", width, inner),
        checkpoint.take(f"{start}down_sampler.b", (inner,)),
        one("up_sampler", inner, width),
        checkpoint.take(f"{start}up_sampler.b", (width,)),
    )


def _hypercomplex(checkpoint: Checkpoint, start: str, width: int) -> Network:
    inner = _reduced(checkpoint, width, 16)
    down, down_bias = _phm(checkpoint, f"{start}down_sampler.", width, inner, "use_bias_down_sampler")
    up, up_bias = _phm(checkpoint, f"{start}up_sampler.", inner, width, "use_bias_up_sampler")
    return Network(down, down_bias, up, up_bias)


def _phm(
    checkpoint: Checkpoint, start: str, rows: int, columns: int, biased: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight [columns, rows] and its bias."""
    config = checkpoint.config
    n = options.integer(config, "hypercomplex_division", 4)
    if rows % n or columns % n:
        raise options.wrong("hypercomplex_division", f"is {n}, and a weight here is {rows} by {columns}")
    if options.flag(config, "factorized_phm_rule"):
        left = checkpoint.take(f"{start}phm_rule_left", (n, n, 1))
        rule = joined(left, checkpoint.take(f"{start}phm_rule_right", (n, 1, n)))
    else:
        if not options.flag(config, "learn_phm", True) and not checkpoint.has(f"{start}phm_rule"):
            raise FailedPrecondition(
                "config key 'learn_phm' is false: the library does not save what it does not train, and drew the rule "
                "at random",
                reason="OPTION_NOT_SERVED",
                metadata={"key": "learn_phm"},
            )
        rule = checkpoint.take(f"{start}phm_rule", (n, n, n))
    if options.flag(config, "factorized_phm", True):
        rank = options.integer(config, "phm_rank", 1)
        left = checkpoint.take(f"{start}W_left", (n, rows // n, rank))
        weight = joined(left, checkpoint.take(f"{start}W_right", (n, rank, columns // n)))
    else:
        weight = checkpoint.take(f"{start}W", (n, rows // n, columns // n))
    bias = checkpoint.take(f"{start}b", (columns,)) if options.flag(config, biased, True) else None
    return expanded(rule, weight), bias


def _reduced(checkpoint: Checkpoint, width: int, usual: int) -> int:
    factor = options.integer(checkpoint.config, "reduction_factor", usual)
    if factor > width:
        raise options.wrong("reduction_factor", f"is {factor}, which leaves nothing of {width} numbers")
    return width // factor


def _activation(checkpoint: Checkpoint, usual: str) -> str | None:
    return activation(checkpoint.config.get("non_linearity", usual), "non_linearity", _ACTIVATIONS)


def _all_there(checkpoint: Checkpoint, word: str, meant: tuple[str, ...] | None) -> None:
    """Raises BadCheckpoint where modules that the config means have no tensors, or others have some."""
    if meant is None:
        return
    found = checkpoint.found[word]
    lacking = [module for module in meant if module not in found]
    if lacking:
        raise BadCheckpoint(
            f"config key 'modified_modules' means {len(meant)} modules, and {len(lacking)} have no tensors, the first "
            f"being {lacking[0]!r}",
            metadata={"module": lacking[0]},
        )
    more = [module for module in found if module not in meant]
    if more:
        raise unserved(more[0], "config key 'modified_modules' does not mean it, and the library would leave it out")


def _pairs(checkpoint: Checkpoint) -> dict[str, str] | None:
    """The second module of each pair by the first, as the library goes through the model; None: it cannot be told."""
    names = targets.wanted(checkpoint, PARALLEL)
    if len(names) % 2:
        raise options.wrong("modified_modules", f"has {len(names)} names; modules of parallel adapters come in pairs")
    meant = targets.modules(checkpoint, names)
    if meant is None:
        return None
    found, at, first = dict[str, str](), 0, ""
    for module in meant:
        if at % 2 == 0:
            first = module
        if at % 2 == 1 or names[at] == names[at + 1]:
            found[first] = module
            at |= 1
        at = (at + 1) % len(names)
    if at % 2:
        raise options.wrong("modified_modules", f"means {first!r} and nothing behind it to end the pair")
    return found


def _usual(checkpoint: Checkpoint, first: str) -> str:
    """A feed-forward's last linear for its first; else the module itself."""
    ends = (sublayer.last for sublayer in checkpoint.backbone.sublayers if sublayer.first == (first,))
    return next(ends, first)
