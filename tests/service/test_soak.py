"""Everything at one time for a minute: answers never change, every call ends, and nothing is left behind."""

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import psutil
import pytest

from deltaserve_client import AsyncClient, DeltaserveError, NotFound, ResourceExhausted

KINDS = {
    "lora": None,
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}
SECONDS = 10
TOKENS = 8
Ids = tuple[int, ...]


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [60])
def test_a_minute_of_everything(
    seconds: int, made: Callable[[str], Any], called: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The pool holds about half of the deltas, so that they come and go all the while."""
    capsys.readouterr()
    made("gpt2").delta("soak-lora", 90)
    for seed in range(16):
        config = KINDS[list(KINDS)[seed % len(KINDS)]]
        made("gpt2").delta(f"soak-{seed}", 100 + seed, None if config is None else config())
    server = called("gpt2", pool_bytes=20_000, max_queued=64, max_running=16)
    before = psutil.Process().memory_info().rss
    ended, wrong = asyncio.run(_soak(server.running.address, seconds))
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert not wrong, wrong[:3]
    assert ended["answered"] > 20 * seconds and ended["cancelled"] > seconds, ended
    assert set(ended) <= {"answered", "cancelled", "replaced", "unloaded", "NotFound", "ResourceExhausted"}, ended
    end = time.monotonic() + 20
    while not server.idle() and time.monotonic() < end:
        time.sleep(0.05)
    assert server.idle()
    assert len(server.app.engine.stats().resident) < 16, "the pool was too large to be of interest"
    server.app.engine._pool.check()
    assert "internal error" not in capsys.readouterr().out
    assert grown < 64 << 20, f"{grown} bytes more than before"


async def _soak(address: str, seconds: int) -> tuple[Counter[str], list[str]]:
    ended: Counter[str] = Counter()
    wrong: list[str] = []
    known: dict[tuple[str, Ids], Ids] = {}
    over = time.monotonic() + seconds
    async with AsyncClient(address) as client:
        for number in range(16):
            await client.deltas.load(f"d{number}", f"soak-{number}")
        asking = [_asks(client, random.Random(n), over, ended, wrong, known) for n in range(12)]
        await asyncio.gather(*asking, _operates(client, random.Random(99), over, ended))
    return ended, wrong


async def _asks(
    client: AsyncClient,
    dice: random.Random,
    over: float,
    ended: Counter[str],
    wrong: list[str],
    known: dict[tuple[str, Ids], Ids],
) -> None:
    """Greedy answers of one delta to one input are the same for ever, whatever is in the batch."""
    while time.monotonic() < over:
        name = f"d{dice.randrange(16)}"
        ids = tuple(dice.choice([[5, 6, 7], [9, 8, 7, 6, 5, 4], [11] * 9]))
        who: dict[str, Any] = {"backbone": True} if dice.random() < 0.1 else {"delta": name}
        try:
            if dice.random() < 0.3:
                stream = client.stream([ids], max_new_tokens=40, ignore_eos=True, timeout=SECONDS, **who)
                async with stream as pieces:
                    async for _ in pieces:
                        if dice.random() < 0.3:
                            break
                ended["cancelled"] += 1
                continue
            result = await client.generate([ids], max_new_tokens=TOKENS, ignore_eos=True, timeout=30, **who)
        except (NotFound, ResourceExhausted) as error:
            ended[type(error).__name__] += 1
            await asyncio.sleep(0.01)
            continue
        except DeltaserveError as error:
            ended[type(error).__name__] += 1
            continue
        ended["answered"] += 1
        said = tuple(result.results[0].samples[0].ids)
        key = (name if "delta" in who else "", ids)
        if known.setdefault(key, said) != said:
            wrong.append(f"{key}: {said}, and before that {known[key]}")


async def _operates(client: AsyncClient, dice: random.Random, over: float, ended: Counter[str]) -> None:
    """Replaces a delta that nobody compares, and unloads and loads those that are in use."""
    while time.monotonic() < over:
        await asyncio.sleep(0.05)
        try:
            if dice.random() < 0.5:
                await client.deltas.load("other", dice.choice(["soak-lora", "soak-3"]), replace=True, timeout=SECONDS)
                ended["replaced"] += 1
            else:
                number = dice.randrange(16)
                await client.deltas.unload(f"d{number}", wait=dice.random() < 0.5, timeout=30)
                await client.deltas.load(f"d{number}", f"soak-{number}", timeout=SECONDS)
                ended["unloaded"] += 1
        except (NotFound, ResourceExhausted) as error:
            ended[type(error).__name__] += 1
