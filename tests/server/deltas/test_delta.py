"""What a delta holds, in the order in which the pool stores it."""

import torch

from deltaserve.deltas.bases import Owners, content_key
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


def sharing_delta() -> tuple[Delta, torch.Tensor]:
    """Two sites look at parts of one base, a third has a pair of its own."""
    base = torch.arange(30.0).view(5, 6)
    at = {
        "a": (LowRank(base[:2, 1:5], base[1:4, :2], 1.0, numbered(1, 2), numbered(2, 3)),),
        "b": (LowRank(base, base.new_ones(7, 5), 1.0),),
        "c": (LowRank(numbered(3, 2, 4), numbered(4, 3, 2), 1.0),),
    }
    provenance = Provenance("test", "hash", 1, 2)
    return Delta(("vera",), at, Task.GENERATION, provenance, bases={content_key(base): base}), base


def test_views_of_a_base_are_not_its_own_bytes():
    delta, base = sharing_delta()
    assert [list(t.shape) for t in delta.tensors()] == [[2], [3], [7, 5], [2, 4], [3, 2]]
    assert delta.nbytes == 4 * delta.parameters == 4 * (2 + 3 + 35 + 8 + 6) and delta.shared_bytes == 4 * 30
    assert delta.owners.base_of(base[4:, 5:]) == content_key(base) and delta.owners.base_of(base.clone()) is None


def test_mapped_keeps_views_views():
    delta, base = sharing_delta()
    halved = mapped(delta, lambda t: t.to(torch.bfloat16))
    (copy,) = halved.bases.values()
    assert copy.dtype is torch.bfloat16 and halved.bases.keys() == delta.bases.keys()
    for name, (lowrank,) in delta.at.items():
        (ours,) = halved.at[name]
        assert torch.equal(ours.a, lowrank.a.to(torch.bfloat16)) and torch.equal(ours.b, lowrank.b.to(torch.bfloat16))
    assert halved.at["a"][0].a.data_ptr() == copy.data_ptr() + 2 and halved.at["b"][0].a.data_ptr() == copy.data_ptr()
    assert halved.nbytes == delta.nbytes / 2 and halved.shared_bytes == delta.shared_bytes / 2
    arena = torch.zeros(100)
    place = arena[40:70].view(5, 6)
    place.copy_(base)
    moved = mapped(delta, torch.clone, {content_key(base): place})
    assert (
        torch.equal(moved.at["a"][0].b, delta.at["a"][0].b) and moved.at["a"][0].b.data_ptr() == arena[46:].data_ptr()
    )


def test_content_is_dtype_shape_and_bytes():
    base = torch.arange(6.0).view(2, 3)
    others = (base.to(torch.bfloat16), base.view(3, 2), base + 1, base.view(torch.int32))
    assert len({content_key(t) for t in (base, *others)}) == 5
    assert content_key(base) == content_key(base.clone()) == content_key(torch.cat((base, base), 1)[:, 3:])


def test_each_view_has_its_owner_among_neighbours():
    whole = torch.zeros(60)
    bases = {str(place): whole[10 * place + 5 : 10 * place + 12] for place in (3, 0, 4, 1)}
    owners = Owners(bases)
    found = [owners.base_of(whole[place : place + 1]) for place in range(60)]
    inside = {at: key for key in bases for at in range(10 * int(key) + 5, 10 * int(key) + 12)}
    assert found == [inside.get(place) for place in range(60)]
    assert Owners({}).base_of(whole) is None
