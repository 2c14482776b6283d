"""Text to token ids and back, over the backbone's tokenizer, fast or slow."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltaserve.errors import FailedPrecondition


class Cut(StrEnum):
    """Where an input that is too long loses tokens."""

    NONE = "none"
    START = "start"
    END = "end"


@dataclass(frozen=True)
class Span:
    """Where a token stands in its segment's text, in characters."""

    segment: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoding:
    """Tokens of one input. `special[i]`: not to be cut. `segments`: 0 or 1. `spans` is None where they are unknown."""

    ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None = None
    special: tuple[bool, ...] = ()
    segments: tuple[int, ...] = ()
    spans: tuple[Span | None, ...] | None = None

    def cut(self, room: int, where: Cut) -> "Encoding":
        """At most `room` tokens. Special tokens stay; the longer of two segments loses tokens first.

        Given ids have no special tokens. Where only special tokens are left and they do not fit, all of them stay.
        """
        excess = len(self.ids) - room
        if excess <= 0 or where is Cut.NONE:
            return self
        special = self.special or (False,) * len(self.ids)
        segments = self.segments or (0,) * len(self.ids)
        left: dict[int, deque[int]] = {0: deque(), 1: deque()}
        for index, (fixed, segment) in enumerate(zip(special, segments, strict=True)):
            if not fixed:
                left[segment].append(index)
        gone = set()
        for _ in range(min(excess, len(left[0]) + len(left[1]))):
            longer = left[0] if len(left[0]) >= len(left[1]) else left[1]
            gone.add(longer.popleft() if where is Cut.START else longer.pop())
        kept = [index for index in range(len(self.ids)) if index not in gone]
        return Encoding(
            ids=tuple(self.ids[i] for i in kept),
            token_type_ids=None if self.token_type_ids is None else tuple(self.token_type_ids[i] for i in kept),
            special=tuple(special[i] for i in kept),
            segments=tuple(segments[i] for i in kept),
            spans=None if self.spans is None else tuple(self.spans[i] for i in kept),
        )


class Text:
    """A tokenizer, or the lack of one. Encoding may run in one thread beside decoding in another."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer: Any = tokenizer
        if tokenizer is not None:
            self.encode("a", None, special=True)  # a tokenizer settles its truncation at its first use

    @property
    def there(self) -> bool:
        return self._tokenizer is not None

    @property
    def classification_token(self) -> int | None:
        """The id that stands before a text for the whole of it (BERT's [CLS]), where the tokenizer has one."""
        found = None if self._tokenizer is None else self._tokenizer.cls_token_id
        return None if found is None else int(found)

    def require(self, field: str) -> None:
        """Raises FailedPrecondition where the backbone came without a tokenizer."""
        if self._tokenizer is None:
            raise FailedPrecondition(
                f"{field}: this backbone came without a tokenizer; send ids", reason="NO_TOKENIZER", field=field
            )

    def encode(self, text: str, pair: str | None, special: bool) -> Encoding:
        """Tokens of a text or of a pair of texts, nothing cut."""
        fast = bool(self._tokenizer.is_fast)
        made = self._tokenizer(
            text,
            pair,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=True,
            return_special_tokens_mask=True,
            return_offsets_mapping=fast,
            verbose=False,
        )
        ids = tuple(made["input_ids"])
        types = made.get("token_type_ids")
        spans: tuple[Span | None, ...] | None = None
        segments = tuple(types or (0,) * len(ids))
        if fast:
            sources = made.sequence_ids(0)
            segments = tuple(source or 0 for source in sources)
            spans = tuple(
                None if source is None else Span(source, *offset)
                for source, offset in zip(sources, made["offset_mapping"], strict=True)
            )
        if "token_type_ids" not in self._tokenizer.model_input_names:
            types = None  # its model was never given any
        mask = made["special_tokens_mask"] if special else (0,) * len(ids)
        return Encoding(ids, None if types is None else tuple(types), tuple(map(bool, mask)), segments, spans)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of a run of tokens; incomplete characters at its ends become U+FFFD, or nothing."""
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def token(self, token: int) -> str:
        """The text of one token on its own; empty where the backbone has no tokenizer."""
        return self.decode((token,), skip_special=False)

    def visible(self, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """The last `count` of `ids` that are not special tokens."""
        if self._tokenizer is None:
            return ()
        special = set(self._tokenizer.all_special_ids)
        return tuple(i for i in ids if i not in special)[-count:]
