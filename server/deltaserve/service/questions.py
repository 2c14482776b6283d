"""Question answering: what a call asks for, and the head's scores as the contract tells them."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaserve.errors import InvalidArgument
from deltaserve.service import spans
from deltaserve.service.text import Encoding, Text
from deltaserve_protos.v1 import inference_pb2 as pb

MOST_SPANS, MOST_ANSWER_TOKENS = 64, 512
_SPANS, _ANSWER_TOKENS = 1, 15


@dataclass(frozen=True)
class Asked:
    """`top_k` spans of at most `longest` tokens. `raw`: their scores are sums of the head's outputs."""

    top_k: int
    longest: int
    raw: bool

    @staticmethod
    def of(message: pb.ClassifyRequest) -> "Asked":
        """Raises InvalidArgument."""
        if message.scores_as == pb.SCORES_AS_SIGMOID:
            raise InvalidArgument(
                "scores_as is SIGMOID; a span's score is a probability (SOFTMAX) or the sum of two outputs (RAW)",
                field="scores_as",
            )
        return Asked(
            _whole(message, "top_k", _SPANS, MOST_SPANS),
            _whole(message, "max_answer_tokens", _ANSWER_TOKENS, MOST_ANSWER_TOKENS),
            message.scores_as == pb.SCORES_AS_RAW,
        )


def answered(
    asked: Asked, given: pb.Input, encoding: Encoding, rows: Sequence[Sequence[float]], text: Text
) -> pb.Classification:
    """One input's result. rows [tokens, 2]: each token as a span's start and as its end."""
    within = spans.allowed(encoding, _segment(given))
    nothing = text.classification_token
    beside = [token == nothing for token in encoding.ids]
    within = [one and not other for one, other in zip(within, beside, strict=True)]
    found = spans.best(rows, within, beside, asked.top_k, asked.longest)
    return pb.Classification(
        spans=pb.QuestionAnswering(
            spans=[_span(one, asked, given, encoding, text) for one in found],
            start_logits=[row[0] for row in rows],
            end_logits=[row[1] for row in rows],
        )
    )


def _segment(given: pb.Input) -> int | None:
    """The one that an answer is taken from."""
    return 1 if given.HasField("text_pair") or 1 in given.token_type_ids else None


def _span(
    found: spans.Found, asked: Asked, given: pb.Input, encoding: Encoding, text: Text
) -> pb.QuestionAnswering.Span:
    span = pb.QuestionAnswering.Span(
        start_token=found.start, end_token=found.end, score=found.logit if asked.raw else found.probability
    )
    first, last = (None if encoding.spans is None else encoding.spans[at] for at in (found.start, found.end))
    if first is None or last is None:
        span.text = text.decode(encoding.ids[found.start : found.end + 1], skip_special=False)
    else:
        span.start, span.end, span.segment = first.start, last.end, first.segment
        span.text = (given.text_pair if first.segment else given.text)[first.start : last.end]
    return span


def _whole(message: pb.ClassifyRequest, field: str, usual: int, most: int) -> int:
    if not message.HasField(field):
        return usual
    value = int(getattr(message, field))
    if not 1 <= value <= most:
        raise InvalidArgument(f"{field} is {value}; it must be from 1 to {most}", field=field)
    return value
