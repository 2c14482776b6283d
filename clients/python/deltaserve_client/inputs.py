"""What is asked about: texts, pairs of texts, token ids; and continuations to be scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from deltaserve_protos.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class Input:
    """One input: either `text`, with an optional second segment, or `ids`, with an optional segment for each.

    `choices`, for multiple choice: texts, the second segments beside `text`; or whole rows of ids without it, as lists
    or, with segments, as Inputs. Raises ValueError where it is none of this.
    """

    text: str | None = None
    text_pair: str | None = None
    ids: Sequence[int] | None = None
    token_type_ids: Sequence[int] | None = None
    choices: "Sequence[Choice] | None" = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if (self.text_pair, self.ids, self.token_type_ids) != (None, None, None):
                raise ValueError("choices go with text, or stand alone")
            return
        if (self.text is None) == (self.ids is None):
            raise ValueError("an Input has either text or ids")
        if self.text_pair is not None and self.text is None:
            raise ValueError("text_pair goes with text")
        if self.token_type_ids is not None and self.ids is None:
            raise ValueError("token_type_ids go with ids")


Choice: TypeAlias = str | Sequence[int] | Input
"""A text, a list of token ids, or an Input of ids."""

Inputs: TypeAlias = str | Input | Sequence[str | Input | Sequence[int]]
"""One text or Input; or a sequence of texts, Inputs and lists of token ids."""

Continuation: TypeAlias = str | Sequence[int]
Continuations: TypeAlias = str | Sequence[Continuation | Sequence[Continuation]]
"""For one input: a text, or a sequence of texts and lists of ids. For a sequence of inputs: a sequence of those."""


def wire(inputs: Inputs) -> list[pb.Input]:
    """Raises TypeError for anything that is no input, ValueError for ids that are no token ids."""
    if isinstance(inputs, str | Input):
        return [_one(inputs, "inputs")]
    return [_one(each, f"inputs[{place}]") for place, each in enumerate(_sequence(inputs, "inputs"))]


def wire_continuations(inputs: Inputs, continuations: Continuations) -> list[pb.ScoreRequest.Continuations]:
    """Raises TypeError for what is no continuation, ValueError where there are not as many sets as inputs."""
    if isinstance(inputs, str | Input):
        return [_set(continuations, "continuations")]
    if isinstance(continuations, str):
        raise TypeError("continuations: for a sequence of inputs give a sequence of sets, one for each")
    sets = _sequence(continuations, "continuations")
    if len(sets) != len(inputs):
        raise ValueError(f"continuations: {len(sets)} for {len(inputs)} inputs")
    return [_set(each, f"continuations[{place}]") for place, each in enumerate(sets)]


def _one(given: object, field: str) -> pb.Input:
    if isinstance(given, Input):
        return pb.Input(
            text=given.text,
            text_pair=given.text_pair,
            ids=_ids(given.ids or (), f"{field}.ids"),
            token_type_ids=_ids(given.token_type_ids or (), f"{field}.token_type_ids"),
            choices=_choices(given.choices, f"{field}.choices"),
        )
    if isinstance(given, str):
        return pb.Input(text=given)
    return pb.Input(ids=_ids(given, field))


def _choices(given: object, field: str) -> list[pb.Choice]:
    if given is None:
        return []
    if isinstance(given, str):
        raise TypeError(f"{field}: one text is no choice; give a sequence of them")
    return [_choice(one, f"{field}[{place}]") for place, one in enumerate(_sequence(given, field))]


def _choice(given: object, field: str) -> pb.Choice:
    if isinstance(given, str):
        return pb.Choice(text=given)
    if not isinstance(given, Input):
        return pb.Choice(ids=_ids(given, field))
    if given.ids is None:
        raise ValueError(f"{field}: a choice that is an Input has ids; give its text as it is")
    types = _ids(given.token_type_ids or (), f"{field}.token_type_ids")
    return pb.Choice(ids=_ids(given.ids, f"{field}.ids"), token_type_ids=types)


def _set(given: object, field: str) -> pb.ScoreRequest.Continuations:
    each = [given] if isinstance(given, str) else _sequence(given, field)
    return pb.ScoreRequest.Continuations(
        continuations=[_continuation(one, f"{field}[{place}]") for place, one in enumerate(each)]
    )


def _continuation(given: object, field: str) -> pb.Continuation:
    return pb.Continuation(text=given) if isinstance(given, str) else pb.Continuation(ids=_ids(given, field))


def _ids(given: object, field: str) -> list[int]:
    try:
        ids = [each.__index__() for each in given]  # type: ignore[attr-defined]  # numpy's integers have it too
    except (TypeError, AttributeError):
        hint = "; for one input of token ids write [[1, 2, 3]]" if isinstance(given, int) else ""
        raise TypeError(f"{field}: {given!r:.100} is neither text nor a sequence of token ids{hint}") from None
    if any(not 0 <= each < 1 << 32 for each in ids):
        raise ValueError(f"{field}: a token id is a number from 0")
    return ids


def _sequence(given: object, field: str) -> Sequence[object]:
    if isinstance(given, bytes | dict) or not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise TypeError(f"{field}: {given!r:.100} is neither text nor a sequence")
    return cast("Sequence[object]", given)
