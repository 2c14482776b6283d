"""The backbone's weights as a lowering reads them, and how a later reader knows that they are still the same."""

import hashlib

import torch

from deltaserve.deltas.bases import octets
from deltaserve.deltas.primitives import Affine, Dense, SitePrimitive
from deltaserve.deltas.sites import Site, Weights


class Weighed:
    """`weights`, and a SHA-256 of each, worked out once: a backbone is frozen. `used`: the sites that were asked for.

    May be called from any thread; two that ask for the same hash at one time both work it out.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._known: dict[str, str] = {}
        self.used: set[str] = set()

    def __call__(self, site: str) -> torch.Tensor:
        self.used.add(site)
        return self._weights(site)

    def digest(self, site: str) -> str:
        """SHA-256 over the bytes of a site's weight in fp32, row by row, in hexadecimal."""
        self.used.add(site)
        if site not in self._known:
            self._known[site] = digest(self._weights(site))
        return self._known[site]


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 over the bytes of a host tensor, in hexadecimal."""
    return hashlib.sha256(octets(tensor)).hexdigest()


def needs_bias(site: Site, primitive: SitePrimitive) -> bool:
    """Whether a lowering may have made this of the backbone's bias at its site; a norm's own bias is none of that."""
    if site.bias is None:
        return False
    match primitive:
        case Affine(_, _, shift, replace):
            return shift is not None and not replace
        case Dense(_, bias):
            return bias is not None
    return False
