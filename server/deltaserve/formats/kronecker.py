"""Sums of Kronecker products: the matrices of Compacter's adapters, expanded once. arXiv 2106.04647."""

import torch


def joined(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left[i] right[i] for each i, float64: left [n, p, k], right [n, k, q] give [n, p, q]."""
    return torch.bmm(left.double(), right.double())


def expanded(rule: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(Σ_i kron(rule[i], weight[i]))ᵀ, fp32 [n q, n p]: as a linear has it, y = x Hᵀ. rule [n, n, n], weight [n, p, q].

    Summed in float64: what the libraries sum in fp32 differs by their rounding.
    """
    count, rows, columns = weight.shape
    blocks = torch.einsum("iab,ipq->bqap", rule.double(), weight.double())
    return blocks.reshape(count * columns, count * rows).float().contiguous()
