"""What Prometheus gets to see. One object owns all series, on a registry of its own; call it from the event loop."""

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

DURATION = (0.0025, 0.005, *(0.01 * 2**k for k in range(14)))
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
PER_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
POWERS = tuple(float(2**k) for k in range(16))


@dataclass(frozen=True)
class Gauges:
    """The state at one moment. `waiting` by cause; bytes by tier; `resident` by kind."""

    running: int
    waiting: Mapping[str, int]
    kv_used_ratio: float
    pool_bytes: int
    pool_capacity_bytes: int
    resident: Mapping[str, int] = field(default_factory=dict)
    combinations: int = 0


class Forward(Protocol):
    """One forward of the engine, as far as it is measured."""

    @property
    def duration(self) -> float: ...
    @property
    def rows(self) -> int: ...
    @property
    def deltas(self) -> Sequence[str]: ...
    @property
    def kinds(self) -> Sequence[str]: ...
    @property
    def phase(self) -> str: ...


class TopLabels:
    """Lets at most `limit` values of a label have series of their own; the rest is `other`.

    Values with the most recent traffic win: counts are halved every `window` observations, and a value that overtakes
    the weakest one takes its place; `dropped` is then called with the value whose series have to go.
    """

    OTHER = "other"

    def __init__(self, limit: int, dropped: Callable[[str], None], window: int = 10_000) -> None:
        self._limit = limit
        self._dropped = dropped
        self._window = window
        self._seen = 0
        self._counts: Tally[str] = Tally()
        self._shown: set[str] = set()

    def label(self, value: str) -> str:
        """Counts one observation of `value`; returns the label that it goes under. "" is always itself."""
        if not value:
            return value
        self._age()
        self._counts[value] += 1
        if value in self._shown:
            return value
        if len(self._shown) >= self._limit:
            weakest = min(self._shown, key=self._counts.__getitem__)
            if self._counts[value] <= self._counts[weakest] + 1:
                return self.OTHER
            self._shown.discard(weakest)
            self._dropped(weakest)
        self._shown.add(value)
        return value

    def _age(self) -> None:
        self._seen += 1
        if self._seen % self._window == 0 or len(self._counts) > 10 * self._limit:
            self._counts = Tally({v: c // 2 for v, c in self._counts.items() if c > 1 or v in self._shown})


class Metrics:
    """The series of one server; names, labels and buckets are the operators' contract."""

    def __init__(self, delta_labels: int = 100) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry(auto_describe=True)
        self._labels = TopLabels(delta_labels, self._forget)
        self._server: tuple[WSGIServer, Thread] | None = None
        self._requests = self._counter("requests_total", "Calls that ended, by gRPC code.", ("task", "code", "delta"))
        self._durations = self._histogram(
            "request_duration_seconds", "From the arrival of a call to its end.", DURATION, ("task", "delta")
        )
        self._first = self._histogram(
            "time_to_first_token_seconds",
            "From the arrival of a call to each sequence's first token.",
            FIRST_TOKEN,
            ("task",),
        )
        self._between = self._histogram(
            "time_per_output_token_seconds", "Between the output tokens of a sequence.", PER_TOKEN
        )
        self._input = self._counter("input_tokens_total", "Tokens of inputs, soft prompts left out.", ("delta",))
        self._output = self._counter("output_tokens_total", "Tokens generated or scored.", ("delta",))
        self._rejections = self._counter(
            "rejections_total", "Calls refused over a limit or while draining.", ("reason",)
        )
        self._steps = self._histogram("step_duration_seconds", "One forward.", PER_TOKEN, ("phase",))
        self._rows = self._histogram("batch_rows", "Rows of a forward.", POWERS)
        self._deltas = self._histogram("batch_deltas", "Distinct deltas in a forward.", POWERS)
        self._kinds = self._histogram("batch_kinds", "Distinct kinds of deltas in a forward.", POWERS)
        self._loads = self._counter("delta_loads_total", "Loads of deltas that ended.", ("from", "outcome"))
        self._load_time = self._histogram("delta_load_duration_seconds", "Loads that worked.", DURATION, ("from",))

    def request(self, task: str, code: str, delta: str, seconds: float) -> None:
        """A call ended. `delta` is the delta's name, "" for the bare backbone or where it was never known."""
        label = self._labels.label(delta)
        self._requests.labels(task, code, label).inc()
        self._durations.labels(task, label).observe(seconds)

    def rejection(self, reason: str) -> None:
        self._rejections.labels(reason.lower()).inc()

    def first_token(self, task: str, seconds: float) -> None:
        self._first.labels(task).observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        """`count` tokens of one sequence came `seconds` after those before."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def tokens(self, delta: str, inputs: int, outputs: int) -> None:
        label = self._labels.label(delta)
        self._input.labels(label).inc(inputs)
        self._output.labels(label).inc(outputs)

    def step(self, forward: Forward) -> None:
        self._steps.labels(forward.phase).observe(forward.duration)
        self._rows.observe(forward.rows)
        self._deltas.observe(len(forward.deltas))
        self._kinds.observe(len(forward.kinds))

    def load(self, outcome: str, seconds: float | None, source: str = "disk") -> None:
        """A load ended; `outcome` is `ok` or the error's code; `seconds` only where it worked."""
        self._loads.labels(source, outcome).inc()
        if seconds is not None:
            self._load_time.labels(source).observe(seconds)

    def watch(self, gauges: Callable[[], Gauges]) -> None:
        """Asks `gauges` whenever somebody scrapes; on the scraper's thread."""
        self.registry.register(_State(gauges))

    def describe(self, build: Mapping[str, str], config: Mapping[str, str]) -> None:
        """What runs here, as the labels of two series that are always 1."""
        self.registry.register(_Facts({"build": dict(build), "config": dict(config)}))

    def serve(self, host: str, port: int) -> int:
        """Starts the endpoint in a thread of its own; returns its port. Raises OSError where the port is taken."""
        assert self._server is None
        self._server = start_http_server(port, addr=host, registry=self.registry)
        return int(self._server[0].server_port)

    def close(self) -> None:
        """Stops the endpoint, if it was started."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"deltaserve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"deltaserve_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _forget(self, delta: str) -> None:
        for metric in (self._requests, self._durations, self._input, self._output):
            metric.remove_by_labels({"delta": delta})


class _State(Collector):
    """Gauges that are read when they are asked for, so that no series outlives what it tells of."""

    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        now = self._gauges()
        yield _gauge("requests_running", "Sequences in the forward.", {(): now.running})
        yield _gauge(
            "requests_waiting", "Sequences that wait.", {(cause,): n for cause, n in now.waiting.items()}, ("cause",)
        )
        yield _gauge("kv_cache_usage_ratio", "Share of the KV cache that is reserved.", {(): now.kv_used_ratio})
        yield _gauge("pool_bytes", "Taken by deltas.", {("device",): now.pool_bytes}, ("tier",))
        yield _gauge("pool_capacity_bytes", "For deltas.", {("device",): now.pool_capacity_bytes}, ("tier",))
        kinds: dict[tuple[str, ...], float] = {("device", kind): n for kind, n in now.resident.items()}
        yield _gauge("deltas_resident", "Deltas in memory that have parts of a kind.", kinds, ("tier", "kind"))
        yield _gauge("combinations_resident", "Deltas in memory that are made of several.", {(): now.combinations})


class _Facts(Collector):
    def __init__(self, facts: Mapping[str, Mapping[str, str]]) -> None:
        self._facts = facts

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        for name, labels in self._facts.items():
            yield _gauge(f"{name}_info", f"The {name} of this server.", {tuple(labels.values()): 1}, tuple(labels))


def _gauge(name: str, text: str, values: Mapping[tuple[str, ...], float], labels: Sequence[str] = ()) -> Metric:
    family = GaugeMetricFamily(f"deltaserve_{name}", text, labels=list(labels))
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family
