"""What does not go together, and weights that mean nothing: refused, with names and places."""

from collections.abc import Callable

import pytest
import torch

from deltaserve.deltas.adapters import Bottleneck, Coupling, Gate, Net, Tap
from deltaserve.deltas.compose import Member, compose
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import (
    Affine,
    Block,
    Dense,
    Head,
    HeadLayer,
    LowRank,
    Prefix,
    Rows,
    SitePrimitive,
    SoftPrompt,
)
from deltaserve.deltas.sites import Pooling, Task
from deltaserve.errors import FailedPrecondition


def delta(*parts: SitePrimitive, site: str = "s", **told) -> Delta:
    task = told.pop("task", Task.GENERATION)
    return Delta(("k",), {site: parts} if parts else {}, task, Provenance("test", "h", 10, 2), **told)


def refused(*deltas: Delta, weight: float = 1.0) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        compose([Member(f"d{i}@1", each, weight) for i, each in enumerate(deltas)])
    return caught.value


def lowrank(site: str) -> Delta:
    return delta(LowRank(torch.ones(2, 4), torch.ones(4, 2), 1.0), site=site)


def whole() -> Delta:
    return delta(Dense(torch.ones(4, 4), None, True))


def adapter(**told) -> Delta:
    return delta(Bottleneck(torch.ones(2, 4), torch.ones(4, 2), **told))


def _prefix(n: int, **told) -> Prefix:
    return Prefix(torch.ones(n, 2, 4), torch.ones(n, 2, 4), **told)


def _coupling() -> Coupling:
    net = Net(torch.ones(1, 2), torch.ones(1), torch.ones(2, 1), torch.ones(2))
    return Coupling(net, net)


def _headed(**told) -> Delta:
    return delta(head=Head((HeadLayer(torch.ones(2, 4)),)), pooling=Pooling.CLS, **told)


TOKENS = torch.tensor([4, 7]).int()
CLASHES: dict[str, tuple[Callable[[], Delta], Callable[[], Delta], str, str]] = {
    # two members, where they clash, what the message says
    "weights": (whole, whole, "at s", "replace the whole weight"),
    "norms": (
        lambda: delta(Affine(scale=torch.ones(4), replace=True)),
        lambda: delta(Affine(scale=torch.ones(4), replace=True)),
        "at s",
        "replace the norm's weight",
    ),
    "rows": (
        lambda: delta(Rows(TOKENS, torch.ones(2, 4))),
        lambda: delta(Rows(TOKENS[1:], torch.ones(1, 4))),
        "at s",
        "row of token 7",
    ),
    "blocks": (
        lambda: delta(Block(torch.ones(3, 4, 4))),
        lambda: delta(Block(torch.ones(6, 2, 2))),
        "at s",
        "[3, 4, 4] and [6, 2, 2]",
    ),
    "rules": (lambda: delta(_prefix(3, pre=-3)), lambda: delta(_prefix(2, tok=2)), "at s", "by other rules"),
    "biased": (lambda: delta(_prefix(3)), lambda: delta(_prefix(2, biased=False)), "at s", "by other rules"),
    "layers": (
        lambda: delta(_prefix(0, biased=False)),
        lambda: delta(_prefix(2), site="other"),
        "at s",
        "takes the relative bias",
    ),
    "gates": (
        lambda: delta(_prefix(3, gate=Gate(torch.ones(1, 4)))),
        lambda: delta(_prefix(2)),
        "at s",
        "a gate of d0@1",
    ),
    "streams": (
        lambda: adapter(replaces=True),
        adapter,
        "at s",
        "takes the place of the whole stream",
    ),
    "heads": (_headed, _headed, "as a whole", "both bring a head"),
    "tasks": (delta, lambda: delta(task=Task.TOKEN_CLASSIFICATION), "as a whole", "neither brings a head"),
    "prompts": (
        lambda: delta(prompt=SoftPrompt(torch.ones(1, 4))),
        lambda: delta(prompt=SoftPrompt(torch.ones(1, 4), 1)),
        "in the input",
        "before the token embeddings and behind row 1",
    ),
    "couplings": (
        lambda: delta(coupling=_coupling()),
        lambda: delta(coupling=_coupling()),
        "at the embeddings",
        "invertible block",
    ),
    "invocations": (lambda: delta(invocation=(3, 4)), delta, "as a whole", "invocation tokens"),
}


@pytest.mark.parametrize("name", CLASHES)
def test_what_does_not_combine_is_refused_by_both_names_and_the_place(name):
    one, two, where, why = CLASHES[name]
    error = refused(one(), two())
    assert "d0@1" in error.message and "d1@1" in error.message and where in error.message and why in error.message
    assert error.reason == "DELTAS_DO_NOT_COMBINE" and error.metadata["where"] == where


def test_of_three_the_two_that_clash_are_named():
    error = refused(lowrank("t"), whole(), whole())
    assert (error.metadata["first"], error.metadata["second"]) == ("d1@1", "d2@1")


WEIGHTLESS: dict[str, Callable[[], Delta]] = {
    "factors": lambda: delta(Affine(scale=torch.ones(4))),
    "replacement": whole,
    "prefix": lambda: delta(_prefix(2)),
    "prompt": lambda: delta(prompt=SoftPrompt(torch.ones(1, 4))),
    "rows": lambda: delta(Rows(TOKENS, torch.ones(2, 4))),
    "blocks": lambda: delta(Block(torch.ones(3, 4, 4))),
    "coupling": lambda: delta(coupling=_coupling()),
    "carried otherwise": lambda: adapter(carry=Tap.NORMED),
    "norm": lambda: delta(Affine(scale=torch.ones(4), replace=True)),
}


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_a_weight_is_refused_where_nothing_is_added(name):
    error = refused(WEIGHTLESS[name](), weight=0.5)
    assert error.reason == "WEIGHT_MEANS_NOTHING" and "d0@1" in error.message and "0.5" in error.message
    compose([Member("d0@1", WEIGHTLESS[name]())])
