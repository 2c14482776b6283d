"""A whole server in one object: what it is made of, how it starts and how it ends."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version as version_of

import structlog
import torch

from deltaserve.app import machine, ports
from deltaserve.app.conversion import command
from deltaserve.app.patience import Patience
from deltaserve.app.summary import Summary, Traffic
from deltaserve.backbone.load import load
from deltaserve.catalog.catalog import Catalog
from deltaserve.catalog.reference import parse_name
from deltaserve.catalog.version import Source
from deltaserve.config import Settings
from deltaserve.deltas.delta import Delta
from deltaserve.engine.loop import Engine, EngineSettings
from deltaserve.engine.request import StepRecord
from deltaserve.errors import DeltaserveError
from deltaserve.formats import registry
from deltaserve.formats.weighed import Weighed
from deltaserve.formats.work import Work
from deltaserve.metrics import Gauges, Metrics
from deltaserve.service.aside import Aside
from deltaserve.service.combining import Combining
from deltaserve.service.deltas import DeltaServicer, Told, release
from deltaserve.service.inference import InferenceServicer
from deltaserve.service.inputs import Reader
from deltaserve.service.loading import Loading
from deltaserve.service.served import Served
from deltaserve.service.server import Server
from deltaserve.service.source import at_start, shown
from deltaserve.service.text import Text

log = structlog.get_logger("deltaserve")

_GRACE = 5.0
"""Seconds for answers on their way, after the engine has ended their requests."""


class App:
    """Building it loads the backbone and takes the memory; `start` and `stop` run on the event loop that serves.

    Raises DeltaserveError for what the operator can mend.
    """

    def __init__(self, settings: Settings) -> None:
        self._began = time.monotonic()
        self._settings = settings
        for name, _ in settings.deltas:
            parse_name(name, "delta")
        log.info("loading the backbone", backbone=settings.backbone)
        backbone = load(
            settings.backbone,
            served_name=settings.served_name,
            revision=settings.revision,
            tokenizer=settings.tokenizer,
            dtype=settings.dtype,
            device=settings.device,
        )
        log.info("loaded the backbone", parameters=backbone.parameters, seconds=self._seconds())
        budget = machine.budget(settings, backbone.device)
        self._weights = Weighed(backbone.weights)
        self.threads = machine.threads(settings)
        self.metrics = Metrics()
        self.catalog = Catalog(self._read)
        self.engine = Engine(
            backbone,
            EngineSettings(
                pool_bytes=budget.pool,
                kv_bytes=budget.kv,
                max_model_len=settings.max_model_len,
                max_batch_tokens=settings.max_batch_tokens,
                max_running=settings.max_running,
                max_queued=settings.max_queued,
                batch_wait=settings.batch_wait_ms / 1000,
                threads=self.threads,
                delta_dtype=settings.delta_dtype,
            ),
            self._fetch,
            self._on_step,
        )
        text = Text(backbone.tokenizer)
        # Both threads settle on one core before the engine's takes its own number: nothing may burn cores beside it.
        one_core = partial(torch.set_num_threads, 1)
        self._tokenizing = Aside("tokenizer", settings.max_queued, one_core)
        self._reading = Aside("reader", settings.max_queued, one_core)
        self.served = Served(
            name=backbone.name,
            backbone=backbone,
            engine=self.engine,
            catalog=self.catalog,
            combining=Combining(self.catalog, self.engine, self._reading, self.metrics),
            text=text,
            reader=Reader(backbone.spec, backbone.type_vocab_size, text),
            tokenizing=self._tokenizing,
            metrics=self.metrics,
            request_timeout=settings.request_timeout,
        )
        hashed = partial(registry.content_hash, allow_pickle=settings.allow_pickle_archives)
        self._loading = Loading(self.catalog, self.engine, hashed, self._read, self._reading, self.metrics)
        told = Told(registry.KINDS, settings.delta_root, int(settings.max_message_bytes))
        self._deltas = DeltaServicer(self.served, self._loading, told)
        self._traffic = Traffic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Server | None = None
        self.grpc_port = self.metrics_port = 0

    async def start(self) -> Summary:
        """Loads the deltas, listens, and is SERVING when it returns. Where it raises, `stop` is still to be called."""
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        for name, path in settings.deltas:
            await self._load_at_start(name, path)
        self._describe()
        try:
            self.metrics_port = self.metrics.serve(settings.host, settings.metrics_port)
        except OSError as error:
            raise ports.taken(settings.host, settings.metrics_port, "--metrics-port", error) from error
        self._server = Server(
            InferenceServicer(self.served), self._deltas, self.metrics, int(settings.max_message_bytes)
        )
        self.grpc_port = await self._server.start(settings.host, settings.grpc_port)
        self._deltas.ready()
        await self._server.ready()
        return self._summary()

    async def ended(self) -> None:
        """Returns when gRPC has stopped; raises the engine's cause of death if it dies."""
        assert self._server is not None
        served = asyncio.create_task(self._server.ended(), name="grpc")
        engine = asyncio.create_task(self._engine_ended(), name="engine")
        try:
            done, _ = await asyncio.wait((served, engine), return_when=asyncio.FIRST_COMPLETED)
        finally:
            served.cancel()
            engine.cancel()
        for task in done:
            task.result()

    async def stop(self, drain_seconds: float) -> None:
        """NOT_SERVING at once; running requests get `drain_seconds`, what is left then ends with UNAVAILABLE."""
        if self._server is not None:
            await self._server.leaving()
        await asyncio.gather(asyncio.to_thread(self.engine.drain, drain_seconds), self._loading.close(drain_seconds))
        if self._server is not None:
            await self._server.stop(_GRACE)
        await asyncio.to_thread(self._close)

    def hurry(self) -> None:
        """Ends a `stop` that is draining. Blocks until the running forward has ended."""
        self.engine.drain(0)

    def tell_traffic(self) -> None:
        self._traffic.tell(self.engine.stats())

    def _close(self) -> None:
        self._tokenizing.close()
        self._reading.close()
        self.metrics.close()

    async def _engine_ended(self) -> None:
        await asyncio.shield(asyncio.wrap_future(self.engine.failure))

    async def _load_at_start(self, name: str, path: str) -> None:
        root = self._settings.delta_root

        def find() -> Source:
            folder = at_start(root, path)
            return Source(folder, shown(root, folder))

        try:
            await self._loading.load(name, find, replace=False)
        except DeltaserveError as error:
            raise type(error)(
                f"--delta {name}={path}: {error.message}", reason=error.reason, metadata=error.metadata
            ) from error

    def _read(self, source: Source) -> Delta:
        """On a reader's thread. What was read once is not refused later: the same estimate meets the same limit."""
        backbone = self.served.backbone
        wanted = registry.Wanted(source.task, source.labels, source.problem_type, source.task_id)
        return registry.read(
            source.folder,
            backbone.spec,
            self._weights,
            wanted,
            allow_pickle=self._settings.allow_pickle_archives,
            work=Work(
                seconds=self._settings.lowering_seconds,
                told=Patience(partial(log.info, "still lowering", source=source.shown)).tell,
                command=command(source.shown, backbone, wanted),
            ),
        )

    def _fetch(self, key: int) -> Delta:
        """On the engine's loader thread: an evicted delta again."""
        started = time.monotonic()
        outcome, seconds = "ok", None
        try:
            delta = self.catalog.fetch(key)
            seconds = time.monotonic() - started
            return delta
        except DeltaserveError as error:
            outcome = error.status
            raise
        finally:
            self._on_loop(partial(self.metrics.load, outcome, seconds))

    def _on_step(self, record: StepRecord) -> None:
        def note() -> None:
            self.metrics.step(record)
            self._traffic.add(record)

        self._on_loop(note)

    def _on_loop(self, work: Callable[[], None]) -> None:
        """Metrics belong to the event loop; there is none any more when the last step ends late."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def _describe(self) -> None:
        backbone, settings = self.served.backbone, self._settings
        self.metrics.watch(self._gauges)
        self.metrics.describe(
            {
                "version": release(),
                "torch": str(torch.__version__),
                "transformers": version_of("transformers"),
                "device": str(backbone.device),
            },
            {
                "backbone": self.served.name,
                "family": backbone.family.name,
                "dtype": str(backbone.dtype).removeprefix("torch."),
                "max_model_len": str(self.engine.limits.max_model_len),
                "max_running": str(settings.max_running),
            },
        )

    def _gauges(self) -> Gauges:
        """On the scraper's thread."""
        now = self.engine.stats()
        found = [self.catalog.get(key) or self.catalog.combinations.get(key) for key in now.resident]
        return Gauges(
            running=now.running,
            waiting={"load": now.waiting_for_load, "queue": max(now.waiting - now.waiting_for_load, 0)},
            kv_used_ratio=now.kv_used_bytes / (now.kv_capacity_bytes or 1),
            pool_bytes=now.pool_used_bytes,
            pool_capacity_bytes=now.pool_capacity_bytes,
            resident=Counter(kind for each in found if each is not None for kind in each.card.kinds),
            combinations=self.catalog.combinations.count(now.resident),
        )

    def _summary(self) -> Summary:
        backbone, now, host = self.served.backbone, self.engine.stats(), self._settings.host
        place = f"[{host}]" if ":" in host else host
        return Summary(
            version=release(),
            grpc=f"{place}:{self.grpc_port}",
            metrics=f"{place}:{self.metrics_port}",
            backbone=self.served.name,
            family=backbone.family.name,
            parameters=backbone.parameters,
            dtype=str(backbone.dtype).removeprefix("torch."),
            device=str(backbone.device),
            threads=self.threads,
            tokenizer=self.served.text.there,
            backbone_bytes=backbone.nbytes,
            pool_bytes=now.pool_capacity_bytes,
            kv_bytes=now.kv_capacity_bytes,
            kv_tokens=now.kv_capacity_tokens,
            max_model_len=self.engine.limits.max_model_len,
            deltas=tuple(version.label for version in self.catalog.all()),
            delta_root=None if self._settings.delta_root is None else str(self._settings.delta_root),
            seconds=self._seconds(),
        )

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 2)
