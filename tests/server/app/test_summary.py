"""What a server says of itself in its log."""

import dataclasses
from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import capture_logs

from deltaserve.app.summary import Summary, Traffic
from deltaserve.engine.request import EngineStats, StepRecord

SUMMARY = Summary(
    version="1", grpc="127.0.0.1:1", metrics="127.0.0.1:2", backbone="[red]tiny[/red]", family="t5",
    parameters=1_500_000, dtype="float32", device="cpu", threads=2, tokenizer=True,
    backbone_bytes=6 << 20, pool_bytes=1 << 30, kv_bytes=4 << 30, kv_tokens=1000, max_model_len=512,
    deltas=("a@1", "b@2"), delta_root=None, seconds=1.25,
)  # fmt: skip
STATS = EngineStats(2, 3, 0, 100, 50, 1000, 500, 10, 5, resident=(1,))


@pytest.fixture(autouse=True)
def everything_is_logged() -> Iterator[None]:
    """Servers that other tests keep running have told structlog to leave out all but errors."""
    before = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**before)


def record(tokens: int, deltas: tuple[str, ...]) -> StepRecord:
    return StepRecord(1, 0.0, 0.1, 6, 3, (), deltas, (), "decode", tokens)


def test_the_event_has_every_field() -> None:
    with capture_logs() as said:
        SUMMARY.tell(people=False)
    assert said == [{"event": "ready", "log_level": "info"} | dataclasses.asdict(SUMMARY)]


def test_the_box_is_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with capture_logs() as said:
        SUMMARY.tell(people=True)
    box = capsys.readouterr().out
    assert not said
    for part in ("127.0.0.1:1", "127.0.0.1:2", "[red]tiny[/red]", "1,500,000", "6 MiB", "4.0 GiB", "a@1, b@2", "1.2 s"):
        assert part in box
    assert "without --delta-root" in box


def test_traffic_is_told_only_if_there_was_any() -> None:
    traffic = Traffic()
    with capture_logs() as said:
        traffic.tell(STATS)
        traffic.add(record(2, ("a@1",)))
        traffic.add(record(3, ("a@1", "b@1")))
        traffic.tell(STATS)
        traffic.tell(STATS)
    (line,) = said
    assert (line["steps"], line["rows_per_step"], line["deltas"]) == (2, 6.0, 2)
    assert (line["running"], line["waiting"], line["kv_used"], line["resident"]) == (2, 3, 0.5, 1)
    assert line["output_tokens_per_second"] > 0
