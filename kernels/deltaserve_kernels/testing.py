"""What kernel tests and benches share: an error that is a ratio, poisoned memory, popularity distributions."""

import random

import torch


def error_ratio(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The worst row's rms(ours − reference) / rms(reference). NaN anywhere in ours is infinity."""
    a, b = ours.detach().double(), reference.detach().double()
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    scale = b.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((a - b).square().mean(-1).sqrt() / scale).max()) if a.numel() else 0.0


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Fresh memory full of NaN: what a kernel does not write shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def popularity(name: str, requests: int, deltas: int, seed: int = 0) -> list[int]:
    """The slot of each request: identical, distinct, uniform, zipf, one_bare (distinct but for one bare request)."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** 1.5 for rank in range(deltas)]
    slots = {
        "identical": lambda: [0] * requests,
        "distinct": lambda: [i % deltas for i in range(requests)],
        "uniform": lambda: [rng.randrange(deltas) for _ in range(requests)],
        "zipf": lambda: rng.choices(range(deltas), weights, k=requests),
        "one_bare": lambda: [-1 if i == requests // 2 else i % deltas for i in range(requests)],
    }
    return slots[name]()


POPULARITIES = ("identical", "distinct", "uniform", "zipf", "one_bare")
