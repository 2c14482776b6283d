"""The training loop, its checkpoints, and exact match on held-out sentences."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import torch

from deltaserve.demo import tokenizer
from deltaserve.demo.batches import Batch, Example, collate

CHECKPOINT_SECONDS = 30.0
Report = Callable[[int, int, float], None]  # steps done, steps in all, loss (NaN before the first)


class OtherTraining(Exception):
    """A checkpoint that this run cannot go on from."""


def backbone() -> Any:
    """The untrained backbone: a gated T5 of 1.3 M parameters."""
    from transformers import T5Config, T5ForConditionalGeneration

    table = tokenizer.ids()
    config = T5Config(
        vocab_size=len(table),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=3,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=table[tokenizer.PAD],
        eos_token_id=table[tokenizer.EOS],
        decoder_start_token_id=table[tokenizer.PAD],
    )
    return T5ForConditionalGeneration(config)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learn(
    model: Any,
    stream: Callable[[Random], Iterator[Batch]],
    *,
    steps: int,
    rate: float,
    seed: int,
    checkpoint: Path,
    report: Report,
) -> float:
    """Trains what is trainable in `model`; returns the seconds it took, over all resumptions.

    AdamW, a short linear warm-up, then a cosine to a twentieth of the rate. A checkpoint that is there is resumed: the
    parameters, the optimiser, the step and the state of the random stream, so a cut run sees the same batches. Raises
    OtherTraining where the checkpoint is of another one: other steps, rate, seed or vocabulary.
    """
    training = f"steps {steps}, rate {rate}, seed {seed}, vocabulary {crc32(repr(tokenizer.ids()).encode()):08x}"
    parameters = trainable(model)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    random, done, spent = Random(seed), 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["training"] != training:
            raise OtherTraining(
                f"{checkpoint} is of another training ({saved['training']}), this one is {training}: "
                "name another work folder, or remove the checkpoint"
            )
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        optimiser.load_state_dict(saved["optimiser"])
        done, spent = saved["done"], saved["spent"]
        version, internal, gauss = saved["random"]
        random.setstate((version, tuple(internal), gauss))

    def save() -> None:
        state = {
            "training": training,
            "parameters": [parameter.data for parameter in parameters],
            "optimiser": optimiser.state_dict(),
            "done": done,
            "spent": spent + time.monotonic() - began,
            "random": random.getstate(),
        }
        fresh = checkpoint.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(checkpoint)

    report(done, steps, math.nan)
    began = saved_at = time.monotonic()
    batches = stream(random)
    model.train()
    while done < steps:
        for group in optimiser.param_groups:
            group["lr"] = rate * _shape(done, steps)
        loss = _step(model, next(batches), parameters, optimiser)
        done += 1
        report(done, steps, loss)
        if done == steps or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            save()
            saved_at = time.monotonic()
    model.eval()
    return spent + time.monotonic() - began


def _shape(done: int, steps: int) -> float:
    warm = min(100, max(1, steps // 10))
    if done < warm:
        return (done + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))


def _step(model: Any, batch: Batch, parameters: list[torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> float:
    answer = model(
        input_ids=batch.inputs, attention_mask=batch.mask, decoder_input_ids=batch.decoder, labels=batch.labels
    )
    optimiser.zero_grad()
    answer.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    return float(answer.loss.detach())


def exact_match(model: Any, examples: list[Example]) -> float:
    """The share of examples whose greedy answer is the target, word for word."""
    return sum(marks(model, examples)) / len(examples)


@torch.no_grad()
def marks(model: Any, examples: list[Example]) -> list[bool]:
    """For each example, whether the greedy answer is the target, word for word."""
    batch, table = collate(examples), tokenizer.ids()
    made = model.generate(input_ids=batch.inputs, attention_mask=batch.mask, max_new_tokens=24, do_sample=False)
    right = []
    for row, each in zip(made.tolist(), examples, strict=True):
        target = [*(table[word] for word in each.target), table[tokenizer.EOS]]
        right.append(row[1 : 1 + len(target)] == target)  # the row opens with the decoder's start token
    return right
