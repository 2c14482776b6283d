"""What a delta holds, in the order in which the pool stores it."""

import torch

from deltaserve.deltas.delta import Delta, Provenance, mapped
from deltaserve.deltas.primitives import Affine, Dense, Head, HeadLayer, LowRank, Prefix, SoftPrompt, tensors
from deltaserve.deltas.sites import Pooling, Task


def numbered(n: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float(n), dtype=dtype)


def full_delta() -> Delta:
    """One of everything; tensors are filled with their place in the order."""
    return Delta(
        kinds=("lora", "head"),
        at={
            "a": (
                LowRank(numbered(0, 2, 3), numbered(1, 4, 2, dtype=torch.bfloat16), 0.5),
                Affine(shift=numbered(2, 4)),
            ),
            "b": (Dense(numbered(3, 4, 3), None, replace=True), Affine(numbered(4, 3), numbered(5, 4), numbered(6, 4))),
            "c": (Prefix(numbered(7, 5, 1, 2), numbered(8, 5, 1, 2), pre=-5, tok=3, biased=False),),
            "d": (Dense(numbered(9, 2, 2), numbered(10, 2)),),
        },
        task=Task.SEQUENCE_CLASSIFICATION,
        provenance=Provenance("test", "hash", 1, 2),
        prompt=SoftPrompt(numbered(11, 6, 3)),
        position_shift=5,
        head=Head((HeadLayer(numbered(12, 3, 3), numbered(13, 3), "tanh"), HeadLayer(numbered(14, 2, 3)))),
        pooling=Pooling.CLS,
        labels=("no", "yes"),
    )


def test_tensors_come_in_one_order():
    delta = full_delta()
    found = list(delta.tensors())
    assert [int(t.flatten()[0]) for t in found] == list(range(15))
    assert delta.parameters == sum(t.numel() for t in found)
    assert delta.nbytes == 4 * delta.parameters - 2 * 8, "B of the LowRank has 8 elements of 2 bytes"
    assert delta.prompt_length == 6 and delta.head is not None and delta.head.width == 2


def test_mapped_changes_tensors_and_nothing_else():
    delta, seen = full_delta(), []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(int(tensor.flatten()[0]))
        return tensor + 100

    changed = mapped(delta, change)
    assert seen == list(range(15)) == [int(t.flatten()[0]) - 100 for t in changed.tensors()]
    assert [int(t.flatten()[0]) for t in delta.tensors()] == seen, "the first is as it was"
    lowrank, dense, prefix = changed.at["a"][0], changed.at["b"][0], changed.at["c"][0]
    assert isinstance(lowrank, LowRank) and lowrank.scale == 0.5
    assert isinstance(dense, Dense) and dense.replace and dense.bias is None
    assert isinstance(prefix, Prefix) and (prefix.pre, prefix.tok, prefix.biased) == (-5, 3, False)
    assert changed.head is not None and [layer.activation for layer in changed.head.layers] == ["tanh", None]
    same = ("kinds", "task", "provenance", "position_shift", "pooling", "labels", "problem_type")
    assert all(getattr(changed, name) == getattr(delta, name) for name in same)


def test_an_empty_delta():
    delta = Delta((), {}, Task.GENERATION, Provenance("test", "", 0, 0))
    assert (delta.parameters, delta.nbytes, delta.prompt_length, list(delta.tensors())) == (0, 0, 0, [])
    assert list(mapped(delta, lambda t: t).tensors()) == []


def test_parts_that_are_not_there_take_no_bytes():
    assert tensors(Affine()) == () and len(tensors(Affine(scale=torch.ones(2)))) == 1
    assert len(tensors(Dense(torch.ones(1, 1)))) == 1
