"""Kernels touch what they were given and nothing else: each access is looked up, and NaN lies around every buffer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from watched import Pages, Watch, watching

from deltaserve_kernels import affine, block, bottleneck, cost, dense, embed, fusion, lowrank, ownnorm, rows, sparse
from deltaserve_kernels.attention import PrefixTable, RelativeBias, Sequence, Sequences, attend
from deltaserve_kernels.cost import Cost
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.gpu.tuning import LOW_RANK
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable
from deltaserve_kernels.testing import error_ratio, popularity

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16)
IN, OUT = 48, 33


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    with watching(monkeypatch) as seen:
        yield seen


Made = tuple[tuple[torch.Tensor | None, ...], tuple[float, ...]]
REGIMES = {"one row each": 1, "a few": 5, "many": 70}
"""Rows of a request: each has tiles of its own."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Rows with slots, of which 2 has nothing here, and memory for them."""

    rowmap: RowMap
    dtype: torch.dtype
    pages: Pages
    watch: Watch

    def table(self, table: SlotTable, make: Callable[[int], Made]) -> SlotTable:
        for slot in (0, 1, 3, 4):
            tensors, scalars = make(slot)
            held = tuple(None if t is None else self.pages.whole(t) for t in tensors)
            table.put(slot, held, scalars)
            self.watch.known += [t for t in held if t is not None]
        return table

    def x(self, width: int) -> torch.Tensor:
        """Rows of no slot that has something here are NaN."""
        values = self.normal(self.rowmap.rows, width)
        inside = self.pages.rows(self._spoilt(values))
        self.watch.given.append(inside)
        return inside

    def y(self, width: int) -> torch.Tensor:
        return self.pages.rows(self._spoilt(torch.randn(self.rowmap.rows, width)))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self.dtype)

    @property
    def mine(self) -> torch.Tensor:
        found = torch.zeros(self.rowmap.rows, dtype=torch.bool)
        for run in self.rowmap.runs:
            found[run.start : run.stop] = run.slot != 2
        return found

    def _spoilt(self, values: torch.Tensor) -> torch.Tensor:
        values[~self.mine] = float("nan")
        return values


Run = tuple[Callable[[], torch.Tensor], Cost]
Op = Callable[[Scene], Run]
"""Makes what it needs; what it returns runs it on copies of what it writes, and what that costs."""


def _low_rank(scene: Scene) -> Run:
    def make(slot: int) -> Made:
        rank = (1, 7, 0, 40, 3)[slot]
        inner = (None, scene.normal(7), None, None, scene.normal(3, 3))[slot]
        outer = scene.normal(OUT) if slot in (0, 4) else None
        return (scene.normal(rank, IN), scene.normal(OUT, rank), inner, outer), (0.5,)

    table = scene.table(lowrank.LowRankTable(5, CPU), make)
    x, y = scene.x(IN), scene.y(OUT)
    costs = cost.low_rank(scene.rowmap, table, scene.dtype.itemsize, LOW_RANK.choose(scene.rowmap).split)
    return _added(scene, y, lambda into: lowrank.apply(into, x, scene.rowmap, table)), costs


def _bottleneck(scene: Scene) -> Run:
    def make(slot: int) -> Made:
        width = (1, 7, 0, 40, 3)[slot]
        biases = (scene.normal(width), scene.normal(OUT)) if slot != 1 else (None, None)
        return (scene.normal(width, IN), scene.normal(OUT, width), *biases), (0.5, float(slot))

    table = scene.table(bottleneck.BottleneckTable(5, CPU), make)
    u, y = scene.x(IN), scene.y(OUT)
    costs = cost.bottleneck(scene.rowmap, table, scene.dtype.itemsize, LOW_RANK.choose(scene.rowmap).split)
    return _added(scene, y, lambda into: bottleneck.apply(into, u, scene.rowmap, table)), costs


def _own_norm(scene: Scene) -> Run:
    table = scene.table(ownnorm.NormTable(5, CPU), lambda _: ((scene.normal(OUT), scene.normal(OUT)), (1e-5,)))
    y = scene.y(OUT)
    return _added(scene, y, lambda into: ownnorm.apply(into, scene.rowmap, table)), cost.own_norm(scene.rowmap, table)


def _fusion(scene: Scene) -> Run:
    """Members beyond a slot's are NaN, and there are more than any slot has."""
    counts = (1, 2, 0, 3, 2)

    def make(slot: int) -> Made:
        asks = (scene.normal(OUT, OUT) / OUT, scene.normal(OUT)) if slot != 1 else (None, None)
        return (*asks, None, scene.normal(OUT, OUT) if slot != 3 else None), (float(counts[slot]),)

    table = scene.table(fusion.FusionTable(5, CPU), make)
    t, y, members = scene.x(OUT), scene.y(OUT), torch.full((scene.rowmap.rows, 4, OUT), float("nan"))
    for run in scene.rowmap.runs:
        members[run.start : run.stop, : counts[run.slot]] = torch.randn(run.rows, counts[run.slot], OUT) / OUT
    held = scene.pages.whole(members)
    scene.watch.given.append(held)
    costs = cost.fusion(scene.rowmap, table, OUT, scene.dtype.itemsize)
    return _added(scene, y, lambda into: fusion.apply(into, t, held, scene.rowmap, table)), costs


def _shared_base(scene: Scene) -> Run:
    table = lowrank.LowRankTable(5, CPU)
    a, b = scene.pages.rows(scene.normal(6, IN)), scene.pages.rows(scene.normal(OUT, 6))
    scene.watch.known += [a, b]
    for slot in (0, 1, 3, 4):
        inner = scene.pages.whole(scene.normal(6))
        scene.watch.known.append(inner)
        table.put(slot, (a, b, inner, None), (1.0,))
    x, y = scene.x(IN), scene.y(OUT)
    costs = cost.low_rank(scene.rowmap, table, scene.dtype.itemsize, LOW_RANK.choose(scene.rowmap).split)
    return _added(scene, y, lambda into: lowrank.apply(into, x, scene.rowmap, table)), costs


def _dense(scene: Scene) -> Run:
    def make(slot: int) -> Made:
        return (scene.normal(OUT, IN), scene.normal(OUT) if slot % 2 else None), (float(slot == 3),)

    table = scene.table(dense.DenseTable(5, CPU), make)
    x, y = scene.x(IN), scene.y(OUT)
    costs = cost.dense(scene.rowmap, table, scene.dtype.itemsize)
    return _added(scene, y, lambda into: dense.apply(into, x, scene.rowmap, table)), costs


def _outputs(scene: Scene) -> Run:
    def make(slot: int) -> Made:
        count = 1 + 3 * slot
        return (torch.randperm(OUT)[:count].sort().values.int(), scene.normal(count, IN)), ()

    table = scene.table(rows.RowsTable(5, CPU), make)
    x, y = scene.x(IN), scene.y(OUT)
    costs = cost.outputs(scene.rowmap, table, scene.dtype.itemsize)
    return _added(scene, y, lambda into: rows.replace_outputs(into, x, scene.rowmap, table)), costs


def _sparse(scene: Scene) -> Run:
    def make(slot: int) -> Made:
        flat = torch.randperm(IN * OUT)[: (1, 90, 0, 3, 200)[slot]].sort().values
        return (torch.stack((flat // IN, flat % IN)).int().contiguous(), scene.normal(len(flat))), ()

    table = sparse.SparseTable(5, CPU)
    scene.table(table, make)
    for slot, entry in table.items().items():
        scene.watch.known += table.bags(slot, entry, OUT)
    x, y = scene.x(IN), scene.y(OUT)
    costs = cost.sparse(scene.rowmap, table, OUT, scene.dtype.itemsize)
    return _added(scene, y, lambda into: sparse.apply(into, x, scene.rowmap, table)), costs


def _affine(scene: Scene) -> Run:
    def make(slot: int) -> Made:
        return tuple(None if slot == n else scene.normal(w) for n, w in enumerate((IN, OUT, OUT))), ()

    table = scene.table(affine.AffineTable(5, CPU), make)
    x, y = scene.x(IN), scene.y(OUT)

    def both(into: torch.Tensor) -> None:
        affine.scale_output(into, scene.rowmap, table)
        into[:, 0] += affine.scale_input(x, scene.rowmap, table).float().sum(1)

    costs = cost.scale_output(scene.rowmap, table) + cost.scale_input(scene.rowmap, table, scene.dtype.itemsize)
    return _added(scene, y, both), costs


def _blocks(scene: Scene) -> SlotTable:
    shapes = ((1, IN, IN), (6, 8, 8), (), (16, 3, 3), (2, 2, 2, 12))
    return scene.table(block.BlockTable(5, CPU), lambda slot: ((scene.normal(*shapes[slot]),), ()))


def _block(scene: Scene) -> Run:
    table, y = _blocks(scene), scene.y(IN)
    costs = cost.block(scene.rowmap, table, IN, 4)
    return _added(scene, y, lambda into: block.turn(into, scene.rowmap, table)), costs


def _block_of_inputs(scene: Scene) -> Run:
    table, x = _blocks(scene), scene.x(IN)
    costs = cost.block(scene.rowmap, table, IN, scene.dtype.itemsize)
    return lambda: block.turned(x, scene.rowmap, table).float(), costs


def _embedded(scene: Scene) -> Run:
    ids = torch.randint(0, 20, (scene.rowmap.rows,))
    whole, own = embed.EmbeddingTable(5, CPU), rows.RowsTable(5, CPU)
    for slot in (0, 1, 3, 4):
        index, values = (
            torch.arange(slot, 20, 3, dtype=torch.int32),
            scene.pages.whole(scene.normal(7, OUT)[: (22 - slot) // 3]),
        )
        own.put(slot, (index, values[: len(index)]))
        scene.watch.known += [index, values]
        if slot != 3:
            whole.put(slot, (scene.pages.whole(scene.normal(20, OUT)),))
            scene.watch.known.append(whole.get(slot).tensors[0])
    low = scene.table(
        embed.LookupTable(5, CPU), lambda slot: ((scene.normal(7, 20), scene.normal(OUT, 7), None, None), (0.5,))
    )
    weight = scene.pages.whole(scene.normal(20, OUT))
    scene.watch.given.append(weight)

    def once() -> torch.Tensor:
        y = scene.pages.rows(embed.rows_of(ids, scene.rowmap, weight, whole, own))
        embed.add_low_rank(y, ids, scene.rowmap, low)
        return y.float()

    return once, cost.NOTHING


def _added(scene: Scene, y: torch.Tensor, run: Callable[[torch.Tensor], None]) -> Callable[[], torch.Tensor]:
    def once() -> torch.Tensor:
        into = scene.pages.rows(y)
        run(into)
        return into.clone()

    return once


OPS: dict[str, Op] = {
    "low rank": _low_rank,
    "low rank, shared base": _shared_base,
    "bottleneck": _bottleneck,
    "norm of its own": _own_norm,
    "fusion": _fusion,
    "dense": _dense,
    "rows of outputs": _outputs,
    "sparse": _sparse,
    "affine": _affine,
    "block": _block,
    "embeddings": _embedded,
    "block of inputs": _block_of_inputs,
}


SHORT = ["one row each", "a few", pytest.param("many", marks=pytest.mark.long)]


@pytest.mark.parametrize("regime", SHORT)
@pytest.mark.parametrize("who", ["uniform", "one_bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", list(OPS))
def test_linears_touch_nothing_else(op, dtype, who, regime, watch):
    most = REGIMES[regime]
    runs = [(slot, 1 + (3 * n) % most if most < 9 else most - n) for n, slot in enumerate(popularity(who, 5, 5))]
    scene = Scene(RowMap.of(runs, CPU), dtype, Pages(), watch)
    run, costs = OPS[op](scene)
    with forced(Implementation.REFERENCE):
        right = run()
    with forced(Implementation.TRITON):
        ours = run()
    assert watch.outside == [] and watch.launches > 0 and watch.accesses > 0
    rounded = {torch.float32: 1e-5, torch.float16: 1e-3 if op in ("affine", "block of inputs", "embeddings") else 1e-5}[
        dtype
    ]
    assert error_ratio(ours[scene.mine], right[scene.mine]) <= rounded
    if op == "embeddings":
        assert torch.equal(ours[~scene.mine], right[~scene.mine]) and scene.pages.unharmed()
        return
    assert ours[~scene.mine].isnan().all()
    assert scene.pages.unharmed()
    assert (len(watch.read), len(watch.written)) == (costs.read, costs.written)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 5])
@pytest.mark.parametrize(
    ("sizes", "causal", "biased", "window"),
    [
        (((0, 3), (9, 2), (20, 1), (2, 2)), True, False, None),
        pytest.param(((600, 1), (3, 70), (530, 2)), True, True, None, marks=pytest.mark.long),
        (((0, 3), (0, 9), (0, 1)), False, True, 4),
    ],
)
def test_attention_touches_nothing_else(sizes, causal, biased, window, width, dtype, watch):
    pages, heads, kv = Pages(), 4, 2
    prefix = PrefixTable(4, CPU)
    for slot, length in ((0, 1), (1, 19)):
        pair = tuple(pages.whole(torch.randn(length, kv, width).to(dtype)) for _ in range(2))
        prefix.put(slot, pair, (-float(length), 0.0, 1.0))
        watch.known += pair
    items, at, tokens = [], 0, 0
    for number, (before, queries) in enumerate(sizes):
        items.append(Sequence(at, queries, before, tokens, before + queries, (0, 1, -1, 3)[number], True))
        at, tokens = at + queries, tokens + before + queries
    rows_ = [pages.rows(torch.randn(at, n, width).to(dtype)) for n in (heads, kv, kv)]
    cache = tuple(pages.rows(torch.randn(tokens, kv, width).to(dtype)) for _ in range(2))
    watch.given += [*rows_, *cache]
    bias = RelativeBias(torch.randn(8, heads), not causal, 40) if biased else None
    found = {}
    for implementation in (Implementation.REFERENCE, Implementation.TRITON):
        with forced(implementation):
            found[implementation] = attend(
                *rows_, Sequences(tuple(items), causal), cache=cache, prefix=prefix, scale=0.3, bias=bias, window=window
            )
    assert watch.outside == [] and watch.launches > 0
    limit = 1e-5 if dtype is torch.float32 else 4e-3
    pair = found[Implementation.TRITON].flatten(1), found[Implementation.REFERENCE].flatten(1)
    assert error_ratio(*pair) <= limit
    assert pages.unharmed()


def test_the_watch_sees_what_is_outside(watch):
    """A launch over one row more than there is, and one that writes to an input."""
    from deltaserve_kernels.gpu import affine as gpu

    rows_ = torch.ones(3, 8)
    slots, board = torch.zeros(4, dtype=torch.int32), torch.zeros(1, gpu.COLUMNS, dtype=torch.int64)
    scale = torch.full((8,), 2.0)
    watch.known.append(scale)
    board[0, :3] = torch.tensor([1, scale.data_ptr(), 1])
    known = {"COLUMNS": gpu.COLUMNS, "SCALE": gpu.SCALE, "SHIFT": 0, "N": 8}
    gpu.affine[(3, 1)](rows_, slots, board, 8, 8, **known)
    assert watch.outside == [] and torch.equal(rows_, torch.full((3, 8), 2.0))
    gpu.affine[(4, 1)](rows_, slots, board, 8, 8, **known)
    assert watch.outside
    watch.outside.clear()
    watch.given.append(rows_)
    gpu.affine[(1, 1)](rows_, slots, board, 8, 8, **known)
    assert watch.outside == ["write of 8 of 8 places"]
