"""Requests that name several deltas: the one delta that answers them, composed when it is first asked for."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deltaserve.catalog.catalog import Catalog
from deltaserve.catalog.combination import Combination, Parts
from deltaserve.deltas.delta import Delta
from deltaserve.engine.loop import Engine
from deltaserve.errors import DeltaserveError, ResourceExhausted
from deltaserve.metrics import Metrics
from deltaserve.service.aside import Aside

log = logging.getLogger(__name__)


class Combining:
    """Members are read and composed in the reader's thread, one combination after the other. On the event loop."""

    def __init__(self, catalog: Catalog, engine: Engine, reading: Aside, metrics: Metrics) -> None:
        self._catalog = catalog
        self._engine = engine
        self._reading = reading
        self._metrics = metrics
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def combined(self, parts: Parts) -> AsyncIterator[Combination]:
        """The members' combination, known until the end of the block at least. The caller leases the members.

        Raises FailedPrecondition where they do not combine, ResourceExhausted, and what reading them again raises.
        """
        known = self._catalog.combinations
        found = known.find(parts)
        if found is None:
            async with self._turn:
                found = known.find(parts) or await self._composed(parts)
        with known.lease(found):
            yield found

    async def _composed(self, parts: Parts) -> Combination:
        known = self._catalog.combinations
        started, outcome = time.monotonic(), "CANCELLED"
        try:
            delta = await self._reading.run(lambda: known.composed(parts))
            while (idle := known.crowded()) is not None:
                known.drop(idle)
                self._engine.retire(idle.key)
            made = known.enter(parts, delta)
            with known.lease(made):
                await self._placed(made, delta)
            outcome = "ok"
        except DeltaserveError as error:
            outcome = error.status
            raise
        finally:
            self._metrics.load(outcome, time.monotonic() - started if outcome == "ok" else None, "members")
        log.info("%s is composed: %s", made.label, ", ".join(made.card.kinds))
        return made

    async def _placed(self, made: Combination, delta: Delta) -> None:
        """Makes it resident at once where there is room; else its requests wait, and it is composed again for them."""
        try:
            await asyncio.shield(asyncio.wrap_future(self._engine.publish(made.key, delta, made.label)))
        except ResourceExhausted:
            return
        except DeltaserveError:
            self._catalog.combinations.drop(made)
            raise
