"""OpenDelta's prefixes (arXiv 2101.00190) and soft prompts (2104.08691)."""

from collections.abc import Iterator

import torch

from deltaserve.deltas.primitives import Prefix, SoftPrompt
from deltaserve.deltas.sites import Axis, BackboneSpec, Site, SiteType
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.draft import Draft
from deltaserve.formats.opendelta import targets
from deltaserve.formats.opendelta.checkpoint import Checkpoint, unserved

PREFIX = ("attn@",)
_FAMILIES = ("bert", "roberta", "t5", "gpt2")
MOST_ROWS = 1 << 14

PREFIX_OPTIONS = options.Options(used=frozenset({"prefix_token_num", "reparameterize", "embed_dim", "mid_dim"}))
SOFT_PROMPT_OPTIONS = options.Options(
    used=frozenset({"soft_token_num"}),
    inert=frozenset({"init_range", "token_init"}),
    refused={"other_expand_ids": "a prompt's rows are seen by all and of the first segment, as in the library's usual"},
)


def prefix(checkpoint: Checkpoint, draft: Draft) -> None:
    """Keys and values [P, d] of each attention as they are, or what an MLP makes of one table for all of them."""
    draft.kind("prefix-tuning")
    spec = checkpoint.backbone
    if spec.family not in _FAMILIES:
        raise FailedPrecondition(
            f"config key 'delta_type' is 'prefix', which the library has for {', '.join(_FAMILIES)} alone; this "
            f"backbone is {spec.family}",
            reason="KIND_NOT_SERVED",
            metadata={"family": spec.family},
        )
    rows = _rows(checkpoint, "prefix", "prefix_token_num", 6)
    made = dict(_made(checkpoint, rows) if "reparams" in checkpoint.found else _plain(checkpoint, rows))
    if spec.encoder_decoder:
        _relative(spec, draft, made, rows)
    else:
        for site, (keys, values) in made.items():
            draft.put(site, Prefix(keys, values))


def soft_prompt(checkpoint: Checkpoint, draft: Draft) -> None:
    """Rows before the tokens' embeddings, of an encoder-decoder in the encoder; positions of all tokens shift."""
    draft.kind("prompt-tuning")
    spec = checkpoint.backbone
    root = "encoder" if spec.encoder_decoder else ""
    (*others,) = (module for module in checkpoint.found["soft_prompt_layer"] if module != root)
    if others:
        raise unserved(others[0], "the library puts a soft prompt before a model's input")
    rows = _rows(checkpoint, "soft_prompt", "soft_token_num", 100)
    start = f"{root}." if root else ""
    draft.prompt = SoftPrompt(checkpoint.take(f"{start}soft_prompt_layer.soft_embeds", (rows, spec.hidden_size)))


Made = Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]


def _plain(checkpoint: Checkpoint, rows: int) -> Made:
    found = checkpoint.found["prefix"]
    meant = _meant(checkpoint)
    if meant is not None and set(meant) != {_attention(checkpoint.backbone, module).name for module in found}:
        raise BadCheckpoint(
            f"config key 'modified_modules' means {len(meant)} attentions, and the tensors stand at {len(found)} others"
        )
    for module in found:
        site = _attention(checkpoint.backbone, module)
        shape = (rows, checkpoint.backbone.hidden_size)
        keys, values = (checkpoint.take(f"{module}.prefix.past_{part}", shape) for part in ("key", "value"))
        yield site.name, (_headed(keys, site), _headed(values, site))


def _made(checkpoint: Checkpoint, rows: int) -> Made:
    """kv = Linear(tanh(Linear(wte))) [P, 2 L d]: of attention l the keys are its cut 2 l, the values 2 l + 1."""
    config, width = checkpoint.config, checkpoint.backbone.hidden_size
    (module, *more) = checkpoint.found["reparams"]
    if more or "prefix" in checkpoint.found:
        raise BadCheckpoint("the checkpoint holds a table of prefixes twice, or keys and values beside one")
    start, inner = f"{module}.reparams.", options.integer(config, "embed_dim", 512)
    middle = options.integer(config, "mid_dim", 512)
    sites = _of_table(checkpoint, f"{start}control_trans.2.bias", module)
    total = 2 * len(sites) * width
    if checkpoint.has(f"{start}input_tokens"):
        checkpoint.integers(f"{start}input_tokens", (rows,), rows)
    table = checkpoint.take(f"{start}wte.weight", (rows, inner)).double()
    first = checkpoint.take(f"{start}control_trans.0.weight", (middle, inner)).double()
    hidden = torch.tanh(table @ first.T + checkpoint.take(f"{start}control_trans.0.bias", (middle,)).double())
    second = checkpoint.take(f"{start}control_trans.2.weight", (total, middle)).double()
    pairs = hidden @ second.T + checkpoint.take(f"{start}control_trans.2.bias", (total,)).double()
    for number, site in enumerate(sites):
        keys, values = (pairs.view(rows, -1, width)[:, 2 * number + part].float() for part in (0, 1))
        yield site.name, (_headed(keys, site), _headed(values, site))


def _of_table(checkpoint: Checkpoint, bias: str, module: str) -> list[Site]:
    """The attentions that one table is for, in the order of the model. Raises where it cannot be told which."""
    spec = checkpoint.backbone
    names = _meant(checkpoint)
    if names is None:
        # Their number is known: if it is that of all, it is all of them.
        names = tuple(site.name for site in spec.sites.values() if _prefixed(site))
        shape = checkpoint.shape(bias) if checkpoint.has(bias) else ()
        if shape != (2 * len(names) * spec.hidden_size,):
            raise FailedPrecondition(
                "config key 'modified_modules' has a pattern, which is never compiled, and the table of prefixes is "
                "for some of the attentions: save it without reparametrisation",
                reason="OPTION_NOT_SERVED",
                metadata={"key": "modified_modules"},
            )
    if not names or names[0] != _attention(spec, module).name:
        raise unserved(module, "config key 'modified_modules' means other attentions first")
    return [spec.sites[name] for name in names]


def _meant(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    if checkpoint.type != "prefix":
        return None
    modules = targets.modules(checkpoint, targets.wanted(checkpoint, PREFIX))
    return None if modules is None else tuple(_attention(checkpoint.backbone, module).name for module in modules)


def _attention(spec: BackboneSpec, module: str) -> Site:
    """The one attention that a module is or has inside: T5's layer, or BERT's block."""
    found = [
        site
        for name, site in spec.sites.items()
        if site.type is SiteType.ATTENTION and (name == module or name.startswith(module + "."))
    ]
    if len(found) != 1 or not _prefixed(found[0]):
        raise unserved(module, "this backbone has no self-attention there")
    return found[0]


def _prefixed(site: Site) -> bool:
    return site.type is SiteType.ATTENTION and site.axis is not Axis.MEMORY


def _headed(rows: torch.Tensor, site: Site) -> torch.Tensor:
    """[P, d] as the library cuts it: [P, heads, d / heads]."""
    if rows.shape[1] != site.kv_heads * site.head_dim:
        raise BadCheckpoint(
            f"a prefix has {rows.shape[1]} numbers a row; {site.name!r} takes {site.kv_heads} heads of {site.head_dim}"
        )
    return rows.reshape(rows.shape[0], site.kv_heads, site.head_dim).contiguous()


def _relative(spec: BackboneSpec, draft: Draft, made: dict[str, tuple[torch.Tensor, torch.Tensor]], rows: int) -> None:
    """A stack's first layer alone has a table of relative positions, and hands what it read on to the others.

    There a prefix stands before the text, whose distances stay. A layer with a prefix reads what it gets only if it is
    the first, and hands on nothing: from there on the others add no bias at all, with or without a prefix.
    """
    for decoder in (False, True):
        sites = [spec.sites[name] for name in _stack(spec, decoder)]
        lost = False
        for number, site in enumerate(sites):
            keys, values = made.get(site.name, (None, None))
            if keys is not None and values is not None:
                draft.put(site.name, Prefix(keys, values, pre=-rows, biased=number == 0))
                lost = True
            elif lost:
                nothing = torch.empty(0, site.kv_heads, site.head_dim)
                draft.put(site.name, Prefix(nothing, nothing.clone(), biased=False))


def _stack(spec: BackboneSpec, decoder: bool) -> list[str]:
    axis = Axis.DECODER if decoder else Axis.TOKENS
    return [site.name for site in spec.sites.values() if _prefixed(site) and site.axis is axis]


def _rows(checkpoint: Checkpoint, type_: str, key: str, usual: int) -> int:
    """How many, by the config; by the tensors where that is another method's."""
    if checkpoint.type == type_:
        rows = options.integer(checkpoint.config, key, usual, most=MOST_ROWS)
    else:
        ends = (".past_key", "soft_embeds")
        sizes = next((checkpoint.shape(name)[:1] for name in checkpoint.names() if name.endswith(ends)), ())
        rows = sizes[0] if sizes else 0
    limit = checkpoint.backbone.max_positions
    if not 0 < rows <= MOST_ROWS or (limit is not None and rows >= limit):
        most = MOST_ROWS if limit is None else limit - 1
        raise BadCheckpoint(f"it has {rows} rows before the text; from 1 to {most} leave room for one here")
    return rows
