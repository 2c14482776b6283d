"""What checkpoints hold in a shorter form: Compacter's matrices, and activations by their libraries' names."""

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.activations import TRANSFORMERS, activation
from deltaserve.formats.kronecker import expanded, joined
from deltaserve_kernels.activations import activated
from deltaserve_kernels.testing import error_ratio


@pytest.mark.parametrize(("n", "p", "q", "k"), [(1, 1, 1, 1), (2, 3, 5, 1), (4, 6, 1, 2), (3, 1, 7, 4)])
def test_a_sum_of_kronecker_products(n: int, p: int, q: int, k: int) -> None:
    torch.manual_seed(0)
    rule = joined(torch.randn(n, n, 1), torch.randn(n, 1, n))
    left, right = torch.randn(n, p, k), torch.randn(n, k, q)
    found = expanded(rule, joined(left, right))
    wanted = sum(torch.kron(rule[i], left[i].double() @ right[i].double()) for i in range(n))
    assert found.shape == (n * q, n * p) and found.dtype is torch.float32 and found.is_contiguous()
    assert isinstance(wanted, torch.Tensor) and error_ratio(found, wanted.T) < 1e-6


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_an_activation_is_that_of_transformers(name: str) -> None:
    x = torch.linspace(-12, 12, 401)
    assert error_ratio(activated(x, TRANSFORMERS[name]), ACT2FN[name](x)) < 1e-6


def test_every_activation_of_transformers_is_known_or_refused() -> None:
    """Two learn numbers of their own, which no checkpoint of an adapter holds; two came after the libraries."""
    refused = {"prelu", "xielu", "hardswish", "sqrtsoftplus"}
    assert set(ACT2FN) - set(TRANSFORMERS) <= refused, transformers.__version__
    for name in refused:
        with pytest.raises(FailedPrecondition, match=name):
            activation(name, "non_linearity", {})


def test_names_of_activations() -> None:
    own = {"gelu_orig": "gelu", "nothing": None}
    assert activation("Gelu_New", "non_linearity", own) == "gelu_tanh"
    assert activation("gelu_orig", "non_linearity", own) == "gelu"
    assert activation("nothing", "non_linearity", own) is None
    with pytest.raises(FailedPrecondition, match=r"'non_linearity' is 'glow'.*gelu_orig"):
        activation("glow", "non_linearity", own)
    with pytest.raises(BadCheckpoint, match="'non_linearity' is 5"):
        activation(5, "non_linearity", own)
