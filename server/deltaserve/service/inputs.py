"""Inputs as the contract has them, checked, tokenised, and cut to the room there is. Runs in the tokenizer's thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deltaserve.deltas.sites import BackboneSpec
from deltaserve.errors import InvalidArgument
from deltaserve.service.text import Cut, Encoding, Text
from deltaserve_protos.v1 import inference_pb2 as pb

MOST_INPUTS = 64
MOST_CONTINUATIONS = 64
CHARACTERS_A_TOKEN = 128
"""Text of more characters than this for each token that fits is refused unread: one thread tokenises for all."""

_CUTS = {
    pb.TRUNCATE_UNSPECIFIED: Cut.NONE,
    pb.TRUNCATE_NONE: Cut.NONE,
    pb.TRUNCATE_START: Cut.START,
    pb.TRUNCATE_END: Cut.END,
}


class Asking(Protocol):
    """What all inference requests have in common."""

    @property
    def inputs(self) -> Sequence[pb.Input]: ...
    @property
    def add_special_tokens(self) -> bool: ...
    @property
    def truncate(self) -> pb.Truncate: ...
    def HasField(self, field_name: str) -> bool: ...


@dataclass(frozen=True)
class Room:
    """What one sequence may hold: `limit` tokens, of which the delta's soft prompt takes `prompt`.

    `shared`: outputs count too (decoder-only); else they have a limit of their own, of the same size.
    """

    limit: int
    prompt: int
    shared: bool

    def left(self, tokens: int) -> int:
        """Output tokens that an input of `tokens` leaves."""
        return self.limit - (tokens + self.prompt if self.shared else 0)

    def inputs(self, outputs: int) -> int:
        """Input tokens that fit beside `outputs`."""
        return self.limit - self.prompt - (outputs if self.shared else 0)


@dataclass(frozen=True)
class Need:
    """Output tokens that have to fit beside an input; `label` names them in messages. None: as many as there is room.

    `wanted`: what a cut input leaves room for, where the number is not fixed.
    """

    outputs: int | None = 0
    label: str = ""
    wanted: int = 0


@dataclass(frozen=True)
class Place:
    """Where in a request a row comes from: an input, or one of its choices."""

    input: int
    choice: int | None = None

    @property
    def field(self) -> str:
        return f"inputs[{self.input}]" + ("" if self.choice is None else f".choices[{self.choice}]")

    def __str__(self) -> str:
        return f"input {self.input}" if self.choice is None else f"choice {self.choice} of input {self.input}"


class Reader:
    """Reads inputs for one backbone."""

    def __init__(self, spec: BackboneSpec, type_vocab_size: int, text: Text) -> None:
        self._spec = spec
        self._types = type_vocab_size
        self._text = text

    def read(self, asking: Asking, room: Room, needs: Sequence[Need]) -> list[Encoding]:
        """One encoding for each input; `needs` has one for each, too. Raises InvalidArgument, FailedPrecondition."""
        encodings = []
        for index, (given, need) in enumerate(zip(asking.inputs, needs, strict=True)):
            if given.choices:
                raise InvalidArgument(
                    f"input {index} has choices; they are for Classify by a delta for multiple choice",
                    field=f"inputs[{index}].choices",
                )
            encodings.append(self.row(asking, given, room, need, Place(index)))
        return encodings

    def row(self, asking: Asking, given: pb.Input, room: Room, need: Need, place: Place) -> Encoding:
        """One row, from what stands at `place`. Raises InvalidArgument, FailedPrecondition."""
        cut = _CUTS.get(asking.truncate)
        if cut is None:
            raise InvalidArgument(f"truncate has no value {int(asking.truncate)}", field="truncate")
        special = asking.add_special_tokens if asking.HasField("add_special_tokens") else True
        _check_characters(given, room, place)
        return _fitted(self._encoded(given, special, place.field), room, need, cut, place)

    def continuation(self, given: pb.Continuation, field: str) -> tuple[int, ...]:
        """A continuation's tokens, at least one. Raises InvalidArgument, FailedPrecondition."""
        _one_of(given.HasField("text"), bool(given.ids), field)
        if given.HasField("text"):
            self._text.require(f"{field}.text")
            ids = self._text.encode(given.text, None, special=False).ids
        else:
            ids = tuple(given.ids)
            self._check_ids(ids, f"{field}.ids")
        if not ids:
            raise InvalidArgument(f"{field} has no tokens", field=field)
        return ids

    def _encoded(self, given: pb.Input, special: bool, field: str) -> Encoding:
        _one_of(given.HasField("text"), bool(given.ids), field)
        if given.HasField("text"):
            if given.token_type_ids:
                raise InvalidArgument(
                    f"{field}: token_type_ids go with ids; text gets its own", field=f"{field}.token_type_ids"
                )
            self._text.require(f"{field}.text")
            pair = given.text_pair if given.HasField("text_pair") else None
            encoding = self._text.encode(given.text, pair, special)
            if not self._types:
                encoding = Encoding(encoding.ids, None, encoding.special, encoding.segments, encoding.spans)
        else:
            if given.HasField("text_pair"):
                raise InvalidArgument(f"{field}: text_pair goes with text, not with ids", field=f"{field}.text_pair")
            encoding = Encoding(tuple(given.ids), tuple(given.token_type_ids) or None)
            self._check_ids(encoding.ids, f"{field}.ids")
            self._check_types(encoding, f"{field}.token_type_ids")
        if not encoding.ids:
            raise InvalidArgument(f"{field} has no tokens", field=field)
        return encoding

    def _check_ids(self, ids: Sequence[int], field: str) -> None:
        if ids and max(ids) >= self._spec.vocab_size:
            raise InvalidArgument(
                f"{field}: {max(ids)} is not below the backbone's vocabulary size {self._spec.vocab_size}", field=field
            )

    def _check_types(self, encoding: Encoding, field: str) -> None:
        types = encoding.token_type_ids
        if types is None:
            return
        if len(types) != len(encoding.ids):
            raise InvalidArgument(f"{field}: {len(types)} of them for {len(encoding.ids)} ids", field=field)
        if max(types) >= self._types:
            known = f"segments are 0 to {self._types - 1}" if self._types else "this backbone knows no segments"
            raise InvalidArgument(f"{field}: {max(types)} is out of range; {known}", field=field)


def count(asking: Asking) -> int:
    """The number of inputs. Raises InvalidArgument if it is out of range."""
    number = len(asking.inputs)
    if not 1 <= number <= MOST_INPUTS:
        raise InvalidArgument(f"{number} inputs; a request has 1 to {MOST_INPUTS}", field="inputs")
    return number


def check_outputs(room: Room, need: Need, field: str) -> None:
    """Whether the outputs alone fit. Raises InvalidArgument."""
    if need.outputs is not None and need.outputs > room.limit - (room.prompt + 1 if room.shared else 0):
        beside = f" with at least 1 token of input and {room.prompt} soft-prompt rows" if room.shared else ""
        raise InvalidArgument(
            f"{need.label} {need.outputs}{beside} is over the limit of {room.limit} tokens",
            field=field,
            metadata={"limit": str(room.limit), "prompt_rows": str(room.prompt)},
        )


def _check_characters(given: pb.Input, room: Room, place: Place) -> None:
    characters, most = len(given.text) + len(given.text_pair), CHARACTERS_A_TOKEN * room.limit
    if characters > most:
        raise InvalidArgument(
            f"{place} has {characters} characters; {most} are read at most, for a limit of {room.limit} tokens",
            reason="INPUT_TOO_LONG",
            field=place.field,
            metadata={"input": str(place.input), "characters": str(characters), "limit": str(most)},
        )


def _fitted(whole: Encoding, room: Room, need: Need, cut: Cut, place: Place) -> Encoding:
    least = (1 if need.wanted else 0) if need.outputs is None else need.outputs
    most = room.inputs(least)
    if len(whole.ids) <= most:
        return whole
    if need.outputs is None:
        # Who lets an input be cut wants an answer of more than one token.
        most = room.inputs(min(need.wanted, (room.limit - room.prompt) // 2)) if cut is not Cut.NONE else most
    fitted = whole.cut(max(most, 1), cut)
    if len(fitted.ids) <= most:
        return fitted
    told = f"{place} has {len(fitted.ids)} tokens"
    parts = [f"{room.prompt} soft-prompt rows"] if room.prompt else []
    if room.shared and (need.outputs or need.outputs is None):
        parts.append(f"{need.label} {need.outputs}" if need.outputs else "at least 1 new token")
    beside = f"; with {' and '.join(parts)}" if parts else ";"
    raise InvalidArgument(
        f"{told}{beside} at most {max(most, 0)} fit the limit of {room.limit} tokens",
        reason="INPUT_TOO_LONG",
        field=place.field,
        metadata={
            "input": str(place.input),
            "tokens": str(len(fitted.ids)),
            "prompt_rows": str(room.prompt),
            "outputs": str(least),
            "fit": str(max(most, 0)),
            "limit": str(room.limit),
        },
    )


def _one_of(text: bool, ids: bool, field: str) -> None:
    if text == ids:
        said = "both text and ids" if text else "neither text nor ids"
        raise InvalidArgument(f"{field} has {said}; give one of them", field=field)
