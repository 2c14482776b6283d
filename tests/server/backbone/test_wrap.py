"""One opened module: its equation, rows without a delta, and its own forward back at the end."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from deltaserve.backbone.linear import WrappedLinear
from deltaserve.deltas.primitives import Affine, Dense, LowRank, Prefix
from deltaserve.deltas.sites import Axis, Site, SiteType
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve.plan import Now, Plan
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio

CPU = torch.device("cpu")


def planned(runs: list[tuple[int, int]], axis: Axis = Axis.TOKENS) -> Plan:
    none = torch.empty(0, dtype=torch.int64)
    return Plan({axis: RowMap.of(runs, CPU)}, {}, None, None, memory=none, sampled=none, pooled=none)


def opened(module: torch.nn.Module, runs: list[tuple[int, int]], axis: Axis = Axis.TOKENS) -> tuple[WrappedLinear, Now]:
    now = Now(plan=planned(runs, axis))
    return WrappedLinear(Site("here", SiteType.LINEAR, axis, 6, 4), module, now, 8, CPU), now


def linear(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(6, 4).to(dtype).requires_grad_(False)


def everything() -> tuple[LowRank, Affine, Dense]:
    torch.manual_seed(1)
    affine = Affine(torch.randn(6), torch.randn(4), torch.randn(4))
    return LowRank(torch.randn(2, 6), torch.randn(4, 2), 0.7), affine, Dense(torch.randn(4, 6), torch.randn(4))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_the_order_at_one_site_is_fixed(conv: bool, replace: bool):
    module = linear()
    if conv:
        weight, module = module.weight, Conv1D(4, 6)
        module.weight, module.bias = (
            torch.nn.Parameter(weight.T.clone(), False),
            torch.nn.Parameter(torch.randn(4), False),
        )
    own = module.bias.double(), (module.weight.T if conv else module.weight).double()
    wrapped, _ = opened(module, [(3, 5)])
    lowrank, affine, dense = everything()
    wrapped.install(3, (lowrank, affine, Dense(dense.weight, dense.bias, replace)))
    x = torch.randn(1, 5, 6)
    u = x.double() * affine.in_scale.double()
    y = u @ own[1].T + own[0]
    added = u @ dense.weight.double().T + dense.bias.double()
    y = added if replace else y + added
    y = y + 0.7 * (u @ lowrank.a.double().T) @ lowrank.b.double().T
    assert error_ratio(module(x)[0], (y * affine.scale.double() + affine.shift.double())[0]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_a_delta_are_bit_identical(dtype: torch.dtype):
    module = linear(dtype)
    wrapped, _ = opened(module, [(-1, 2), (3, 2), (-1, 1), (5, 1), (1, 3)])
    x = torch.randn(1, 9, 6, dtype=dtype)
    own = module(x)
    wrapped.install(3, everything())
    wrapped.install(1, everything()[:1])
    mixed = module(x)
    untouched, touched = [0, 1, 4, 5], [2, 3, 6, 7, 8]
    assert torch.equal(mixed[0, untouched], own[0, untouched]) and mixed.dtype is dtype and mixed.shape == own.shape
    assert (mixed[0, touched] != own[0, touched]).any(-1).all()


def test_a_forward_in_which_nothing_acts_runs_the_modules_own_code():
    module = linear()
    wrapped, now = opened(module, [(2, 3)])
    wrapped.install(3, everything())
    x = torch.randn(1, 3, 6)
    own = torch.nn.functional.linear(x, module.weight, module.bias)
    assert torch.equal(module(x), own)
    now.plan = planned([(-1, 3)])
    assert torch.equal(module(x), own)
    wrapped.remove(3)
    assert "forward" not in vars(module)


def test_the_module_keeps_its_name_type_and_weights():
    model = torch.nn.Sequential(linear())
    module, weight = model[0], model[0].weight
    wrapped, _ = opened(module, [(0, 1)])
    wrapped.install(0, everything())
    assert type(module) is torch.nn.Linear and module.weight is weight
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]


def test_rows_that_were_not_planned_and_primitives_that_cannot_act_are_bugs():
    module = linear()
    wrapped, now = opened(module, [(0, 3)])
    wrapped.install(0, everything())
    with pytest.raises(AssertionError, match="5 rows, 3 planned"):
        module(torch.randn(1, 5, 6))
    with pytest.raises(AssertionError):
        wrapped.install(0, everything())
    with pytest.raises(AssertionError, match="Prefix cannot act"):
        wrapped.install(1, (Prefix(torch.ones(1, 1, 2), torch.ones(1, 1, 2)),))
    now.plan = None
    with pytest.raises(AssertionError, match="outside a forward"):
        module(torch.randn(1, 3, 6))


def test_cross_keys_and_values_are_made_once(drive, make_delta, monkeypatch):
    """Steps that admit nobody do not read the weights of EncDecAttention.k and .v, with a delta or without."""
    driver = drive("t5")
    attention = driver.backbone.model.decoder.block[1].layer[1].EncDecAttention
    names = {id(attention.k.weight): "k", id(attention.v.weight): "v", id(attention.q.weight): "q"}
    calls: list[str] = []
    original = torch.nn.functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(names.get(id(weight), ""))
        return original(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    for turn in ("none resident", "bare", "delta"):
        if turn == "bare":
            driver.publish(1, make_delta("lowrank", driver.backbone.spec))
        calls.clear()
        ref = driver.ref(1) if turn == "delta" else None
        driver.finished(Request(turn, Job.GENERATE, (5, 6, 7), ref, sampling=Sampling(6)))
        assert [calls.count(name) for name in "kvq"] == [1, 1, 6]
