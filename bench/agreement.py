"""Whether what is about to be timed computes the right thing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.clock import Variant
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
CHANCE = 1.5


@dataclass(frozen=True)
class Agreement:
    error_ratio: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error_ratio <= self.limit


def of(
    variants: Sequence[Variant],
    references: Mapping[str, str],
    truth: Mapping[str, Callable[[], torch.Tensor]] | None,
) -> Mapping[str, Agreement]:
    """For each variant that has a reference: how far their results are apart.

    In float32 (`truth` None) that is their error ratio, EXACT at most. Where both round at every layer, either is as
    far from the same forward in float32, `truth[reference]`, as chance has it: ours may be CHANCE times as far.
    """
    found = {variant.name: _result(variant) for variant in variants}
    if truth is None:
        return {
            name: Agreement(error_ratio(found[name], found[reference]), EXACT) for name, reference in references.items()
        }
    before = {variant.name: variant.before for variant in variants}
    right: dict[str, torch.Tensor] = {}
    for reference, compute in truth.items():
        before[reference]()
        right[reference] = compute()
    return {
        name: Agreement(
            error_ratio(found[name], right[reference]), CHANCE * error_ratio(found[reference], right[reference])
        )
        for name, reference in references.items()
    }


def _result(variant: Variant) -> torch.Tensor:
    variant.before()
    result = variant.run()
    assert isinstance(result, torch.Tensor)
    return result.float()
