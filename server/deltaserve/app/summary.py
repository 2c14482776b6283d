"""What a server says of itself: once when it is ready, and a line now and then while there is traffic."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import structlog
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deltaserve.engine.request import EngineStats, StepRecord

log = structlog.get_logger("deltaserve")


@dataclass(frozen=True)
class Summary:
    """One ready server. `grpc` and `metrics` are host:port; bytes and seconds."""

    version: str
    grpc: str
    metrics: str
    backbone: str
    family: str
    parameters: int
    dtype: str
    device: str
    threads: int
    tokenizer: bool
    backbone_bytes: int
    pool_bytes: int
    kv_bytes: int
    kv_tokens: int
    max_model_len: int
    deltas: tuple[str, ...]
    delta_root: str | None
    seconds: float

    def tell(self, people: bool) -> None:
        """The event `ready`, or a box for people."""
        if not people:
            log.info("ready", **asdict(self))
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, value in self._facts().items():
            grid.add_row(name, Text(value))
        title = f"deltaserve {self.version} is ready"
        Console(highlight=False).print(Panel(grid, title=title, title_align="left", expand=False))

    def _facts(self) -> Mapping[str, str]:
        given = "text and token ids" if self.tokenizer else "token ids only: the backbone came without a tokenizer"
        kv = f"keys and values {_size(self.kv_bytes)} ({self.kv_tokens} tokens)" if self.kv_tokens else ""
        memory = (f"backbone {_size(self.backbone_bytes)}", f"deltas {_size(self.pool_bytes)}", kv)
        root = "" if self.delta_root else "; without --delta-root none can be loaded later"
        return {
            "backbone": f"{self.backbone} ({self.family}, {self.parameters:,} parameters)",
            "device": f"{self.device}, {self.dtype}, {_threads(self.threads)}",
            "inputs": f"{given}, {self.max_model_len} tokens at most",
            "memory": ", ".join(part for part in memory if part),
            "deltas": (", ".join(self.deltas) or "none yet") + root,
            "gRPC": f"{self.grpc}, no keys and no TLS in this release",
            "metrics": f"http://{self.metrics}/metrics",
            "started in": f"{self.seconds:.1f} s",
        }


class Traffic:
    """Counts what the forwards did since the last line."""

    def __init__(self) -> None:
        self._begin()

    def add(self, record: StepRecord) -> None:
        self._steps += 1
        self._rows += record.rows
        self._tokens += record.output_tokens
        self._deltas.update(record.deltas)

    def tell(self, now: EngineStats) -> None:
        """One line if there was any."""
        if self._steps:
            seconds = time.monotonic() - self._since
            log.info(
                "traffic",
                steps=self._steps,
                rows_per_step=round(self._rows / self._steps, 1),
                deltas=len(self._deltas),
                output_tokens_per_second=round(self._tokens / seconds, 1),
                running=now.running,
                waiting=now.waiting,
                kv_used=round(now.kv_used_bytes / (now.kv_capacity_bytes or 1), 3),
                resident=len(now.resident),
            )
        self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._steps = self._rows = self._tokens = 0
        self._deltas: set[str] = set()


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
