"""Prefix-tuning (arXiv 2101.00190), prompt tuning (2104.08691) and their like as PEFT writes them.

P-tuning (2103.10385), CPT (2410.17222), Cartridge (2506.06266), multitask prompts (2303.02861). A reparametrisation by
an MLP or an LSTM, a frozen part or a bounded change is on disk as its result: nothing of it is left to compute.
"""

from deltaserve.deltas.primitives import Prefix, SoftPrompt
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint

TENSOR = "prompt_embeddings"
MOST_ROWS = 1 << 14

_SHAPE = {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"}
PREFIX_OPTIONS = options.Options(
    used=frozenset(_SHAPE), inert=frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"})
)
CARTRIDGE_OPTIONS = options.Options(used=frozenset(_SHAPE), inert=frozenset({"num_frozen_tokens"}))
PROMPT_OPTIONS = options.Options(
    used=frozenset(_SHAPE),
    # The start of the training; PEFT opens no file for it at inference, and neither do we.
    inert=frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}),
)
P_TUNING_OPTIONS = options.Options(
    used=frozenset(_SHAPE),
    inert=frozenset(
        {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
    ),
)

CPT_OPTIONS = options.Options(
    used=frozenset(_SHAPE),
    inert=frozenset(
        {"cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor"}
        | {"opt_projection_epsilon", "opt_projection_format_epsilon", "tokenizer_name_or_path"}
    ),
)

MULTITASK_OPTIONS = options.Options(
    used=frozenset({*_SHAPE, "num_tasks", "num_ranks"}),
    inert=PROMPT_OPTIONS.inert | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"},
)


def lower_prefix(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """Keys and values for each layer's attention: P [n, 2 L, kv_heads, d], K of slot l at 2 l, V at 2 l + 1.

    Decoder-only and encoder families: layer l reads slot l. Encoder-decoders: only the decoder's self-attention has a
    prefix, and its layer l reads slot 2 l mod L, because PEFT repeats its list of keys and values and cuts it by fours.
    """
    del weights
    draft.kind(_KINDS[checkpoint.config["peft_type"]])
    spec, config = checkpoint.backbone, checkpoint.config
    if not spec.prefix_sites:
        raise FailedPrecondition(
            f"config key 'peft_type' is {config['peft_type']!r}, and transformers' code for {spec.family} takes no "
            "keys and values from outside: PEFT refuses such a delta, or runs without its prefix",
            reason="KIND_NOT_SERVED",
            metadata={"peft_type": str(config["peft_type"]), "family": spec.family},
        )
    rows = _rows(checkpoint)
    layers = len(spec.prefix_sites)
    sites = [spec.sites[name] for name in spec.prefix_sites]
    heads, width = sites[0].kv_heads, sites[0].head_dim
    told = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}
    for key, expected in told.items():
        if config.get(key) not in (None, expected):
            raise BadCheckpoint(
                f"config key {key!r} is {options.shown(config[key])}; this backbone has {expected}",
                metadata={"key": key},
            )
    tensor = checkpoint.take(TENSOR, (rows, 2 * layers * heads * width)).view(rows, 2 * layers, heads, width)
    for layer, site in enumerate(sites):
        slot = 2 * layer % layers if spec.encoder_decoder else layer
        keys, values = (tensor[:, 2 * slot + part].contiguous() for part in (0, 1))
        draft.put(site.name, Prefix(keys, values, pre=spec.prefix_pre * rows))
    draft.position_shift = rows if spec.prefix_positions else 0


def lower_prompt(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """Rows before the token embeddings; of an encoder-decoder's two parts only the first, the encoder's, is used."""
    del weights
    draft.kind(_KINDS[checkpoint.config["peft_type"]])
    rows = _rows(checkpoint)
    told = checkpoint.config.get("num_transformer_submodules")
    usual = 2 if checkpoint.backbone.encoder_decoder else 1
    parts = usual if told is None else options.integer(checkpoint.config, "num_transformer_submodules", most=2)
    tensor = checkpoint.take(TENSOR, (parts * rows, checkpoint.backbone.hidden_size))
    draft.prompt = SoftPrompt(tensor[:rows].clone())


def lower_multitask(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """Rows P ⊙ (C D) of one task: P [n, hidden] is shared by tasks, C [n, k] and D [k, hidden] are the task's own."""
    config, task = checkpoint.config, draft.task_id
    assert task is not None
    if checkpoint.backbone.encoder_decoder:
        raise options.wrong("peft_type", "is 'MULTITASK_PROMPT_TUNING', which PEFT cannot run on an encoder-decoder")
    lower_prompt(checkpoint, draft, weights)
    assert draft.prompt is not None
    shared = draft.prompt.rows.float()
    rank = options.integer(config, "num_ranks", 1)
    tasks = options.integer(config, "num_tasks", 1)
    columns = checkpoint.take("prefix_task_cols", (tasks, shared.shape[0], rank))[task].float()
    across = checkpoint.take("prefix_task_rows", (tasks, rank, shared.shape[1]))[task].float()
    draft.prompt = SoftPrompt(shared * (columns @ across))


_KINDS = {
    "PREFIX_TUNING": "prefix-tuning",
    "CARTRIDGE": "cartridge",
    "PROMPT_TUNING": "prompt-tuning",
    "P_TUNING": "p-tuning",
    "CPT": "cpt",
    "MULTITASK_PROMPT_TUNING": "multitask-prompt-tuning",
}


def _rows(checkpoint: Checkpoint) -> int:
    rows = options.integer(checkpoint.config, "num_virtual_tokens", most=MOST_ROWS)
    limit = checkpoint.backbone.max_positions
    if limit is not None and rows >= limit:
        raise BadCheckpoint(f"{rows} virtual tokens leave no room for a text: this backbone has {limit} positions")
    return rows
