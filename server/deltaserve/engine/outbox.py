"""Events on their way out: gathered during a step, handed to each caller in one piece after it."""

import logging

from deltaserve.engine.request import Emit, Event
from deltaserve.engine.sequence import Sequence

log = logging.getLogger(__name__)


class Outbox:
    """Used by the engine's thread alone."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[Emit, list[Event]]] = {}

    def put(self, sequence: Sequence, event: Event) -> None:
        self._pending.setdefault(id(sequence.emit), (sequence.emit, []))[1].append(event)

    def flush(self) -> None:
        """Hands everything over. A caller that cannot take its events does not hold up the others."""
        pending, self._pending = self._pending, {}
        for emit, events in pending.values():
            try:
                emit(events)
            except Exception:
                # A caller's event loop may be closed by now; its requests end all the same.
                log.exception("events could not be handed over")
