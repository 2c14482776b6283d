"""DeltaService: which deltas there are, and what this server is."""

import asyncio
import base64
import binascii
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from deltaserve.catalog.reference import parse, parse_name
from deltaserve.catalog.version import Source, Version
from deltaserve.errors import InvalidArgument
from deltaserve.service import convert, source
from deltaserve.service.call import Call
from deltaserve.service.inputs import MOST_INPUTS
from deltaserve.service.loading import Loading
from deltaserve.service.served import Served
from deltaserve_protos.v1 import deltas_pb2 as pb
from deltaserve_protos.v1 import deltas_pb2_grpc

T = TypeVar("T")

PAGE, MOST_PAGE = 100, 1000
MOST_LABELS, LONGEST_LABEL = 100_000, 256


@dataclass(frozen=True)
class Told:
    """What only the operator's settings and the release say. `kinds` are those of deltas that can be loaded."""

    kinds: tuple[str, ...]
    delta_root: Path | None
    max_message_bytes: int


class DeltaServicer(deltas_pb2_grpc.DeltaServiceServicer):
    """Behind the interceptor, which makes a `Call` of the context and statuses of errors."""

    def __init__(self, served: Served, loading: Loading, told: Told) -> None:
        self._served = served
        self._catalog = served.catalog
        self._loading = loading
        self._told = told
        self._since: float | None = None

    def ready(self) -> None:
        """From here on the server is up."""
        self._since = time.monotonic()

    async def LoadDelta(self, request: pb.LoadDeltaRequest, context: Call) -> pb.LoadDeltaResponse:
        name = parse_name(request.name)
        task = _known(request.task, convert.TASK_OF, "task")
        problem = _known(request.problem_type, convert.PROBLEM_OF, "problem_type")
        labels = _labels(tuple(request.labels))
        task_id = request.task_id if request.HasField("task_id") else None
        root = self._told.delta_root

        def find() -> Source:
            folder = source.below(root, request.source)
            return Source(folder, source.shown(root, folder), task, labels, problem, task_id)

        loaded = await self._loading.load(name, find, request.replace)
        context.delta = loaded.label
        return pb.LoadDeltaResponse(delta=self._shown(loaded))

    async def UnloadDelta(self, request: pb.UnloadDeltaRequest, context: Call) -> pb.UnloadDeltaResponse:
        leaving = self._loading.unload(parse(request.name))
        shown = [self._shown(version) for version, _ in leaving]
        if request.wait:
            await asyncio.shield(asyncio.gather(*(task for _, task in leaving)))
        freed = sum(task.result() for _, task in leaving if task.done())
        return pb.UnloadDeltaResponse(deltas=shown, freed_bytes=freed)

    async def GetDelta(self, request: pb.GetDeltaRequest, context: Call) -> pb.GetDeltaResponse:
        return pb.GetDeltaResponse(delta=self._shown(self._catalog.find(parse(request.name))))

    async def ListDeltas(self, request: pb.ListDeltasRequest, context: Call) -> pb.ListDeltasResponse:
        size = request.page_size if request.HasField("page_size") else PAGE
        if not 1 <= size <= MOST_PAGE:
            raise InvalidArgument(f"page_size is {size}; it must be from 1 to {MOST_PAGE}", field="page_size")
        after = _read_token(request.page_token)
        left = [v for v in self._catalog.all() if (v.name, v.number) > after]
        resident = self._resident()
        return pb.ListDeltasResponse(
            deltas=[convert.delta(v, resident, self._catalog.in_flight(v.key)) for v in left[:size]],
            next_page_token=_token(left[size - 1]) if len(left) > size else "",
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Call) -> pb.GetServerInfoResponse:
        served, engine = self._served, self._served.engine
        backbone, limits, now = served.backbone, engine.limits, engine.stats(steps=request.steps)
        return pb.GetServerInfoResponse(
            version=release(),
            backbone=served.name,
            family=backbone.family.name,
            tasks=sorted(backbone.spec.tasks),
            kinds=self._told.kinds,
            device=str(backbone.device),
            dtype=str(backbone.dtype).removeprefix("torch."),
            parameters=backbone.parameters,
            has_tokenizer=served.text.there,
            limits=pb.Limits(
                max_model_len=limits.max_model_len,
                max_inputs=MOST_INPUTS,
                max_batch_tokens=limits.max_batch_tokens,
                max_running=limits.max_running,
                max_queued=limits.max_queued,
                max_message_bytes=self._told.max_message_bytes,
            ),
            memory=pb.Memory(
                backbone_bytes=backbone.nbytes,
                kv_capacity_bytes=now.kv_capacity_bytes,
                kv_used_bytes=now.kv_used_bytes,
                pool_capacity_bytes=now.pool_capacity_bytes,
                pool_used_bytes=now.pool_used_bytes,
            ),
            steps=[convert.step(record) for record in now.steps],
            running=now.running,
            waiting=now.waiting,
            resident=len(now.resident),
            combinations=self._catalog.combinations.count(now.resident),
            uptime=0.0 if self._since is None else time.monotonic() - self._since,
        )

    def _shown(self, given: Version) -> pb.Delta:
        """As it is now: a version's record is a moment's."""
        now = self._catalog.get(given.key) or given
        return convert.delta(now, self._resident(), self._catalog.in_flight(given.key))

    def _resident(self) -> frozenset[int]:
        return frozenset(self._served.engine.stats().resident)


def release() -> str:
    try:
        return version("deltaserve")
    except PackageNotFoundError:
        return "0+source"


def _known(value: int, known: Mapping[Any, T], field: str) -> T:
    if value not in known:
        raise InvalidArgument(f"{field} has no value {value}", field=field)
    return known[value]


def _labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(labels) > MOST_LABELS:
        raise InvalidArgument(f"{len(labels)} labels; {MOST_LABELS} at most", field="labels")
    for index, label in enumerate(labels):
        if not 1 <= len(label) <= LONGEST_LABEL:
            raise InvalidArgument(
                f"label {index} has {len(label)} characters; it must have 1 to {LONGEST_LABEL}",
                field=f"labels[{index}]",
            )
    if len(set(labels)) < len(labels):
        raise InvalidArgument("two labels are the same", field="labels")
    return labels


def _token(last: Version) -> str:
    return base64.urlsafe_b64encode(last.label.encode()).decode()


def _read_token(token: str) -> tuple[str, int]:
    """Name and number of the last delta of the page before; what comes before all others for the first page."""
    if not token:
        return ("", 0)
    try:
        reference = parse(base64.urlsafe_b64decode(token.encode()).decode())
    except (ValueError, binascii.Error, InvalidArgument):
        reference = None
    if reference is None or reference.number is None:
        raise InvalidArgument("page_token is not one that ListDeltas gave", field="page_token")
    return (reference.name, reference.number)
