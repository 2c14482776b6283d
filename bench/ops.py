"""Each kernel on a device against its reference on the CPU, over odd sizes and every popularity."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from bench.rows import Outcome, Row
from deltaserve_kernels import affine, block, dense, embed, lowrank, rows, sparse
from deltaserve_kernels.attention import PrefixTable, RelativeBias, Sequence, Sequences, attend
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import POPULARITIES, error_ratio, poisoned, popularity

EXACT = 1e-5
"""Sums are fp32 on both sides."""
ROUNDED = {"affine": 5e-3, "block": 5e-3, "attention": 1e-2}
"""Of the ops that round their result to bfloat16, whose last bit may differ; attention rounds probabilities too. The
others add to fp32 rows."""
DELTAS, REQUESTS, IN, OUT, HEADS, HEAD_DIM = 5, 9, 67, 97, 4, 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INTERPRETED = {"float32": torch.float32, "float16": torch.float16}
"""On a CPU: Triton's interpreter cuts bfloat16 where GPUs round."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Where an op runs, who is in the batch, and the same random numbers for everybody."""

    device: torch.device
    dtype: torch.dtype
    slots: tuple[int, ...]
    decoding: bool
    random: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        made = torch.randn(*shape, generator=self.random)
        return made.to(dtype or self.dtype).to(self.device)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """While decoding one row for each request, else 1 to 3."""
        return [(slot, 1 if self.decoding else 1 + number % 3) for number, slot in enumerate(self.slots)]

    @property
    def rowmap(self) -> RowMap:
        return RowMap.of(self.runs, self.device)

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.runs)


Op = Callable[[Scene], torch.Tensor]


def _low_rank(scene: Scene) -> torch.Tensor:
    table = lowrank.LowRankTable(DELTAS, scene.device)
    for slot in range(DELTAS):
        rank = 1 + 3 * slot
        table.put(slot, (scene.normal(rank, IN), scene.normal(OUT, rank)), (0.5,))
    y = scene.normal(scene.rows, OUT, dtype=torch.float32)
    lowrank.apply(y, scene.normal(scene.rows, IN), scene.rowmap, table)
    return y


def _affine(scene: Scene) -> torch.Tensor:
    table = affine.AffineTable(DELTAS, scene.device)
    for slot in range(DELTAS):
        row = (scene.normal(IN), scene.normal(IN), scene.normal(IN))
        table.put(slot, tuple(None if slot == place else t for place, t in enumerate(row)))
    y = affine.scale_input(scene.normal(scene.rows, IN), scene.rowmap, table).float()
    affine.scale_output(y, scene.rowmap, table)
    return y


def _dense(scene: Scene) -> torch.Tensor:
    table = dense.DenseTable(DELTAS, scene.device)
    for slot in range(DELTAS):
        bias = scene.normal(OUT) if slot % 2 else None
        table.put(slot, (scene.normal(OUT, IN), bias), (float(slot == 1),))
    y = scene.normal(scene.rows, OUT, dtype=torch.float32)
    dense.apply(y, scene.normal(scene.rows, IN), scene.rowmap, table)
    return y


def _block(scene: Scene) -> torch.Tensor:
    table = block.BlockTable(DELTAS, scene.device)
    for slot, shape in enumerate(((1, 96, 96), (96, 1, 1), (12, 8, 8), (32, 3, 3), (4, 2, 2, 12))):
        table.put(slot, (scene.normal(*shape),))
    y = block.turned(scene.normal(scene.rows, 96), scene.rowmap, table).float()
    block.turn(y, scene.rowmap, table)
    return y


def _places(scene: Scene, count: int, below: int) -> torch.Tensor:
    """Distinct, sorted int32."""
    found = torch.randperm(below, generator=scene.random)[:count].sort().values
    return found.to(torch.int32).to(scene.device)


def _sparse(scene: Scene) -> torch.Tensor:
    table = sparse.SparseTable(DELTAS, scene.device)
    for slot in range(DELTAS):
        flat = _places(scene, 1 + 50 * slot, IN * OUT)
        table.put(slot, (torch.stack((flat // IN, flat % IN)).contiguous(), scene.normal(flat.shape[0])))
    y = scene.normal(scene.rows, OUT, dtype=torch.float32)
    sparse.apply(y, scene.normal(scene.rows, IN), scene.rowmap, table)
    return y


def _rows_looked_up(scene: Scene) -> torch.Tensor:
    table = rows.RowsTable(DELTAS, scene.device)
    for slot in range(DELTAS):
        table.put(slot, (_places(scene, 2 + 3 * slot, 20), scene.normal(2 + 3 * slot, OUT)))
    y = scene.normal(scene.rows, OUT)
    ids = torch.randint(0, 20, (scene.rows,), generator=scene.random).to(scene.device)
    rows.replace_rows(y, ids, scene.rowmap, table)
    return y


def _rows_of_outputs(scene: Scene) -> torch.Tensor:
    table = rows.RowsTable(DELTAS, scene.device)
    for slot in range(DELTAS):
        table.put(slot, (_places(scene, 2 + 3 * slot, OUT), scene.normal(2 + 3 * slot, IN)))
    y = scene.normal(scene.rows, OUT, dtype=torch.float32)
    rows.replace_outputs(y, scene.normal(scene.rows, IN), scene.rowmap, table)
    return y


def _heads(scene: Scene) -> torch.Tensor:
    layers: dict[int, list[dense.Layer]] = {
        slot: [(scene.normal(IN, IN), scene.normal(IN), "tanh"), (scene.normal(2 + slot, IN), None, None)]
        for slot in range(DELTAS)
    }
    slots = [slot for slot in scene.slots if slot >= 0]
    rowmap = RowMap.of([(slot, 1) for slot in slots], scene.device)
    found = dense.heads(scene.normal(len(slots), IN), rowmap, layers)
    return torch.stack([torch.nn.functional.pad(scores, (0, DELTAS + 2 - scores.numel())) for scores in found])


def _prompt(scene: Scene) -> torch.Tensor:
    table = embed.PromptTable(DELTAS, scene.device)
    for slot in range(DELTAS):
        table.put(slot, (scene.normal(4, IN),))
    out = scene.normal(4 * len(scene.slots), IN)
    pieces = [(slot, 4 * number, 1, 3) for number, slot in enumerate(scene.slots) if slot >= 0]
    embed.prompt_rows(out, table, pieces)
    return out


def _attention(scene: Scene, *, causal: bool, biased: bool, window: int | None = None) -> torch.Tensor:
    """Prefill and decode rows of grouped heads over a cache whose unused rows are NaN, with prefixes."""
    prefix = PrefixTable(DELTAS, scene.device)
    for slot in range(0, DELTAS, 2):
        pair = (scene.normal(3 + slot, HEADS // 2, HEAD_DIM), scene.normal(3 + slot, HEADS // 2, HEAD_DIM))
        prefix.put(slot, pair, (-float(3 + slot), 0.0, 1.0))
    room = 16
    items: list[Sequence] = []
    write: list[int] = []
    for number, (slot, count) in enumerate(scene.runs):
        first, position = len(write), (0, 7)[number % 2]
        items.append(Sequence(first, count, position, number * room, position + count, slot, True))
        write += range(number * room + position, number * room + position + count)
    cache = []
    for _ in range(2):
        made = poisoned(len(items) * room, HEADS // 2, HEAD_DIM, dtype=scene.dtype, device=str(scene.device))
        for item in items:
            made[item.key_start : item.key_start + item.position] = scene.normal(item.position, HEADS // 2, HEAD_DIM)
        cache.append(made)
    bias = RelativeBias(scene.normal(8, HEADS), bidirectional=not causal, max_distance=20) if biased else None
    query = scene.normal(scene.rows, HEADS, HEAD_DIM)
    keys, values = (scene.normal(scene.rows, HEADS // 2, HEAD_DIM) for _ in range(2))
    places = torch.tensor(write, device=scene.device)
    sequences = Sequences(tuple(items), causal, places)
    found = attend(
        query, keys, values, sequences,
        cache=(cache[0], cache[1]), prefix=prefix, scale=HEAD_DIM**-0.5, bias=bias, window=window,
    )  # fmt: skip
    return found.flatten(1)


OPS: Mapping[str, Op] = {
    "lowrank": _low_rank,
    "affine": _affine,
    "dense": _dense,
    "block": _block,
    "sparse": _sparse,
    "rows, looked up": _rows_looked_up,
    "rows, of outputs": _rows_of_outputs,
    "heads": _heads,
    "prompt": _prompt,
    "attention, causal": lambda scene: _attention(scene, causal=True, biased=False),
    "attention, causal, T5 bias": lambda scene: _attention(scene, causal=True, biased=True),
    "attention, both ways, T5 bias": lambda scene: _attention(scene, causal=False, biased=True),
    "attention, both ways, window": lambda scene: _attention(scene, causal=False, biased=False, window=4),
}


def check(device: torch.device, seed: int, *, tiny: bool) -> Iterator[Row]:
    """A row for each op and dtype: its worst error over all popularities, while decoding and not.

    On a CPU kernels run in Triton's interpreter; `tiny` looks at the popularities that have most in them.
    """
    spreads = ("uniform", "one_bare") if tiny else POPULARITIES
    for name, op in OPS.items():
        for told, dtype in (INTERPRETED if device.type == "cpu" else DTYPES).items():
            worst = max(_error(op, device, dtype, who, decoding, seed) for who in spreads for decoding in (False, True))
            limit = EXACT if dtype is torch.float32 else ROUNDED.get(name.split(",")[0], EXACT)
            outcome: Outcome = "right" if worst <= limit else "wrong"
            yield Row("gpu.op", outcome, {"op": name, "dtype": told}, error_ratio=worst, limit=limit)


@torch.inference_mode()
def _error(op: Op, device: torch.device, dtype: torch.dtype, who: str, decoding: bool, seed: int) -> float:
    slots = tuple(popularity(who, REQUESTS, DELTAS, seed))

    def scene(place: torch.device) -> Scene:
        return Scene(place, dtype, slots, decoding, torch.Generator().manual_seed(seed))

    with forced(Implementation.TRITON):
        ours = op(scene(device))
    with forced(Implementation.REFERENCE):
        right = op(scene(torch.device("cpu")))
    return error_ratio(ours.cpu(), right)
