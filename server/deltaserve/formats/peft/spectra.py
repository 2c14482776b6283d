"""Methods that learn a few numbers of a weight's change in another basis: FourierFT, WaveFT."""

import torch

from deltaserve.deltas.primitives import Dense, Sparse
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.draft import Draft
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each

_PLACED = TARGETED | {"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "bias"}
FOURIERFT_OPTIONS = options.Options(used=_PLACED, inert=TRAINED)
WAVEFT_OPTIONS = options.Options(
    used=_PLACED | {"wavelet_family", "use_idwt", "proportional_parameters"}, inert=TRAINED
)

_MOST_FREQUENCIES = 1 << 24


def fourierft(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = scaling · Re ifft2(D), D zero but for a spectrum at random places, which a seed gives. arXiv 2405.03003."""
    spread = _Spread(checkpoint, "fourierft_spectrum", 1000)
    scaling = options.number(checkpoint.config, "scaling", 150)

    def one(target: Target, _: Weights) -> None:
        turned = torch.fft.ifft2(spread.of(target)).real
        draft.put(target.name, Dense((turned * scaling).contiguous()))

    each("fourierft", one, "fourier")(checkpoint, draft, weights)


def waveft(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = scaling · D by the inverse of a 2-D wavelet transform (Haar's), or D itself. arXiv 2505.12532.

    Each number of D spreads over 2 × 2 places, so that ΔW is mostly zero where D has few.
    """
    config = checkpoint.config
    spread = _Spread(checkpoint, "waveft_spectrum", 2592)
    scaling, transformed = options.number(config, "scaling", 25), options.flag(config, "use_idwt", True)
    family = config.get("wavelet_family", "db1")
    if transformed and family != "db1":
        raise options.not_served("wavelet_family", family, "this release serves db1, Haar's wavelet")

    def one(target: Target, _: Weights) -> None:
        found = spread.of(target)
        change = scaling * (_haar(found) if transformed else found)
        index = change.nonzero(as_tuple=True)
        if 3 * index[0].numel() < change.numel():
            places = torch.stack(index)
            draft.put(target.name, Sparse(places.int().contiguous(), change[index]))
        else:
            draft.put(target.name, Dense(change.contiguous()))

    each("waveft", one, "waveft")(checkpoint, draft, weights)


def _haar(coefficients: torch.Tensor) -> torch.Tensor:
    """One level of Haar's transform, inverted: quarters [[mean, by rows], [by columns, both]] to 2 × 2 places each.

    Odd sizes are made even with zeros first, and cut afterwards, as PEFT does.
    """
    rows, columns = coefficients.shape
    padded = torch.nn.functional.pad(coefficients, (0, columns % 2, 0, rows % 2))
    (mean, down), (across, both) = ((part.chunk(2, 1)) for part in padded.chunk(2, 0))
    made = torch.empty_like(padded)
    for i, row in enumerate((1, -1)):
        for j, column in enumerate((1, -1)):
            made[i::2, j::2] = (mean + row * down + column * across + row * column * both) / 2
    return made[:rows, :columns]


class _Spread:
    """D [out, in] of each module: its learned numbers at the places that a seed gives."""

    def __init__(self, checkpoint: Checkpoint, part: str, usual: int) -> None:
        config = checkpoint.config
        self._part = part
        self._count = options.integer(config, "n_frequency", usual, most=_MOST_FREQUENCIES)
        self._counts = options.ranks(config, "n_frequency_pattern", most=_MOST_FREQUENCIES)
        self._seed = options.seed(config, "random_loc_seed", 777)
        self._shared_out = options.flag(config, "proportional_parameters")

    def of(self, target: Target) -> torch.Tensor:
        places = target.outputs * target.inputs
        count = target.setting(self._counts, "n_frequency_pattern", self._count)
        if self._shared_out:
            # A budget for all modules by their sizes: the file says what each one got.
            count = (target.shape(self._part) or (count,))[0]
        if count > places:
            raise BadCheckpoint(f"{target.own!r} has {places} numbers and cannot hold a spectrum of {count}")
        spectrum = target.number(self._part, count)
        random = torch.Generator().manual_seed(self._seed)
        made = torch.zeros(places)
        made[torch.randperm(places, generator=random)[:count]] = spectrum
        return made.view(target.outputs, target.inputs)
