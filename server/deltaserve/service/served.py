"""What is served, for the handlers: the backbone, the engine, the catalog and the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from deltaserve.backbone.model import Backbone
from deltaserve.catalog.catalog import Catalog
from deltaserve.catalog.combination import Answering
from deltaserve.engine.loop import Engine
from deltaserve.engine.request import Finished, Request
from deltaserve.errors import InvalidArgument
from deltaserve.metrics import Metrics
from deltaserve.service.answers import Answers
from deltaserve.service.aside import Aside
from deltaserve.service.combining import Combining
from deltaserve.service.inputs import Asking, Need, Reader, Room
from deltaserve.service.text import Encoding, Text


@dataclass(frozen=True, eq=False)
class Served:
    """`name`: what the backbone is called in answers. `request_timeout`: seconds, for callers without a deadline."""

    name: str
    backbone: Backbone
    engine: Engine
    catalog: Catalog
    combining: Combining
    text: Text
    reader: Reader
    tokenizing: Aside
    metrics: Metrics
    request_timeout: float

    def room(self, version: Answering | None) -> Room:
        """What one sequence may hold for this delta: a prefix may push real tokens off the last positions."""
        spec, limit = self.backbone.spec, self.engine.limits.max_model_len
        card = None if version is None else version.card
        if card is not None and spec.max_positions is not None:
            limit = min(limit, spec.max_positions - card.position_shift)
        return Room(limit, 0 if card is None else card.prompt_length, shared=not spec.encoder_decoder)

    async def read(self, asking: Asking, room: Room, needs: Sequence[Need]) -> list[Encoding]:
        """One encoding for each input, from the tokenizer's thread. Raises what `Reader.read` raises."""
        return await self.tokenizing.run(partial(self.reader.read, asking, room, needs))

    def check_number(self, sequences: int) -> None:
        """Raises InvalidArgument for a request that the queue could not take even if it were empty."""
        most = self.engine.limits.max_queued
        if sequences > most:
            raise InvalidArgument(
                f"this request is {sequences} sequences, inputs times samples, continuations or choices, and {most} "
                "may wait (--max-queued); split it",
                reason="REQUEST_TOO_LARGE",
                field="inputs",
                metadata={"sequences": str(sequences), "limit": str(most)},
            )

    async def finished(self, requests: Sequence[Request]) -> list[Finished]:
        """Runs requests to their ends; answers in their order. Raises the error of the first that failed."""
        self.check_number(len(requests))
        async with Answers(self.engine, requests) as answers:
            ended = await answers.finished()
        return [ended[request.id] for request in requests]

    def count(self, version: Answering | None, inputs: int, outputs: int = 0) -> None:
        """Tokens for the metrics, under the delta's name, or the names of all."""
        self.metrics.tokens("" if version is None else version.name, inputs, outputs)
