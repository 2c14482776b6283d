"""One sample of a generation as it grows: tokens in, pieces of text out, until it ends or is stopped."""

from dataclasses import dataclass, field

from deltaserve.engine.request import FinishReason, PositionLogprobs, Tokens
from deltaserve.service.detokenizer import Detokenizer, StopStrings


@dataclass
class Piece:
    """What one step added. `reason` is set in the last one; `stop` is the string that ended the sample, if one did."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None
    stop: str | None = None

    @property
    def empty(self) -> bool:
        return not self.ids and self.reason is None


class Growing:
    """`min_new_tokens`: before that many tokens a stop string does not stop. `count`: tokens so far, for usage.

    Log-probabilities of the prompt may come over several steps; they are held until the first token.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings, min_new_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._least = min_new_tokens
        self._prompt: list[PositionLogprobs] = []
        self.count = 0
        self.ended = False

    def add(self, event: Tokens, piece: Piece) -> None:
        """Tokens of one step; those after a stop string are left out."""
        assert not self.ended
        self._prompt.extend(event.prompt_logprobs)
        if event.ids:
            piece.prompt_logprobs, self._prompt = [*piece.prompt_logprobs, *self._prompt], []
        for index, token in enumerate(event.ids):
            self.count += 1
            piece.ids.append(token)
            piece.logprobs.extend(event.logprobs[index : index + 1])
            piece.text += self._stops.feed(self._detokenizer.feed(token), self.count >= self._least)
            if self._stops.found is not None:
                self._end(piece, FinishReason.STOP)
                break

    def end(self, piece: Piece, reason: FinishReason) -> None:
        """The engine ended the sample: what was held back comes out."""
        assert not self.ended
        piece.text += self._stops.feed(self._detokenizer.end(), self.count >= self._least)
        if self._stops.found is not None:
            self._end(piece, FinishReason.STOP)
        else:
            piece.text += self._stops.end()
            self._end(piece, reason)

    def _end(self, piece: Piece, reason: FinishReason) -> None:
        self.ended = True
        piece.reason, piece.stop = reason, self._stops.found
