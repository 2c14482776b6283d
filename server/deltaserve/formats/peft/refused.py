"""PEFT's types that cannot be a delta here, and why: what an operator is told."""

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "ADAPTION_PROMPT": "it adds a second, gated attention over its own prompt to every layer",
    "LILY": "its router averages over the whole batch, so that an answer would depend on the requests beside it",
    "SHADOW": "it runs a second, recurrent network beside the layers",
    "XLORA": "a classifier mixes several LoRA anew for each token, in a forward of its own",
    "ADAMSS": "which rows belong together is not in the checkpoint: PEFT clusters the weights anew at each load",
    "BONE": "PEFT has removed it; convert the checkpoint to MISS with PEFT's script",
}
"""By `peft_type`. Whatever is neither here nor in the table of types is unknown."""
