"""Sampling as the contract has it, checked and with its defaults, as the engine wants it."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from deltaserve.engine import request as engine
from deltaserve.errors import FailedPrecondition, InvalidArgument
from deltaserve_protos.v1 import inference_pb2 as pb

DEFAULT_NEW_TOKENS = 128
MOST_STOPS = 16
LONGEST_STOP = 256


@dataclass(frozen=True)
class _Rule:
    """A field, the values that it may have, and how that is said."""

    field: str
    allowed: Callable[[float], bool]
    said: str


_RULES = (
    _Rule("temperature", lambda v: 0 <= v <= 100, "from 0 to 100"),
    _Rule("top_p", lambda v: 0 < v <= 1, "above 0 and up to 1"),
    _Rule("min_p", lambda v: 0 <= v <= 1, "from 0 to 1"),
    _Rule("repetition_penalty", lambda v: v > 0, "above 0"),
    _Rule("presence_penalty", lambda v: -2 <= v <= 2, "from -2 to 2"),
    _Rule("frequency_penalty", lambda v: -2 <= v <= 2, "from -2 to 2"),
    _Rule("max_new_tokens", lambda v: v >= 1, "at least 1"),
    _Rule("n", lambda v: 1 <= v <= 16, "from 1 to 16"),
    _Rule("logprobs", lambda v: v <= 20, "from 0 to 20"),
    _Rule("prompt_logprobs", lambda v: v <= 20, "from 0 to 20"),
)


@dataclass(frozen=True)
class Wish:
    """What was asked for, checked. `max_new_tokens` is None where it depends on the room that an input leaves.

    `sampling` has everything else, but neither a seed nor a number of tokens that counts.
    """

    sampling: engine.Sampling
    max_new_tokens: int | None
    seed: int | None
    n: int
    stop: tuple[str, ...]

    def for_sample(self, room: int, input_index: int, sample_index: int) -> engine.Sampling:
        """For one sample of an input that leaves `room` tokens. Raises InvalidArgument if there is no right number."""
        most = self.most(room)
        least = self.sampling.min_new_tokens
        if least > most:
            raise InvalidArgument(
                f"min_new_tokens {least} is above max_new_tokens {most}"
                + ("" if self.max_new_tokens else f" (128, or the room that input {input_index} leaves)"),
                field="sampling.min_new_tokens",
            )
        return replace(
            self.sampling,
            max_new_tokens=most,
            seed=None if self.seed is None else stream(self.seed, input_index, sample_index),
            # Every sample of an input would report the same.
            prompt_logprobs=self.sampling.prompt_logprobs if sample_index == 0 else None,
        )

    def most(self, room: int) -> int:
        """Tokens to generate at most where `room` are left."""
        return self.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)


def wish(message: pb.Sampling, *, eos_ids: tuple[int, ...], vocab_size: int, decoder_only: bool) -> Wish:
    """Checks a message. Raises InvalidArgument, and FailedPrecondition for what this backbone does not give."""
    for rule in _RULES:
        value = getattr(message, rule.field)
        if message.HasField(rule.field) and not (math.isfinite(value) and rule.allowed(value)):
            raise InvalidArgument(f"{rule.field} is {value:g}; it must be {rule.said}", field=f"sampling.{rule.field}")
    temperature = message.temperature if message.HasField("temperature") else 0.0
    n = message.n if message.HasField("n") else 1
    if n > 1 and temperature == 0:
        raise InvalidArgument(
            f"n is {n}, and without a temperature all samples would be the same; set temperature above 0",
            field="sampling.n",
        )
    if message.HasField("prompt_logprobs") and not decoder_only:
        raise FailedPrecondition(
            "prompt_logprobs: an encoder-decoder gives its input no probabilities; Score has those of continuations",
            field="sampling.prompt_logprobs",
        )
    _check_stops(message, vocab_size)
    return Wish(
        sampling=engine.Sampling(
            max_new_tokens=0,
            min_new_tokens=message.min_new_tokens,
            temperature=temperature,
            top_k=message.top_k,
            top_p=message.top_p if message.HasField("top_p") else 1.0,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            end_ids=frozenset() if message.ignore_eos else frozenset(eos_ids),
            stop_ids=frozenset(message.stop_ids),
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        ),
        max_new_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else None,
        seed=message.seed if message.HasField("seed") else None,
        n=n,
        stop=tuple(message.stop),
    )


def stream(seed: int, input_index: int, sample_index: int) -> int:
    """A seed of its own for each sample of each input; 63 bits, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{input_index}/{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _check_stops(message: pb.Sampling, vocab_size: int) -> None:
    for field, values in (("stop", message.stop), ("stop_ids", message.stop_ids)):
        if len(values) > MOST_STOPS:
            raise InvalidArgument(f"{field} has {len(values)} members; {MOST_STOPS} at most", field=f"sampling.{field}")
    for index, string in enumerate(message.stop):
        if not 1 <= len(string) <= LONGEST_STOP:
            raise InvalidArgument(
                f"stop string {index} has {len(string)} characters; it must have 1 to {LONGEST_STOP}",
                field=f"sampling.stop[{index}]",
            )
    for index, token in enumerate(message.stop_ids):
        if token >= vocab_size:
            raise InvalidArgument(
                f"stop id {token} is not below the backbone's vocabulary size {vocab_size}",
                field=f"sampling.stop_ids[{index}]",
            )
