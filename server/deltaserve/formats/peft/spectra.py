"""Methods that learn a few numbers of a weight's change in another basis: FourierFT, WaveFT."""

import torch

from deltaserve.deltas.primitives import Dense, Sparse
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each
from deltaserve.formats.peft.wavelets import FILTERS

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
    """ΔW = scaling · D by the inverse of a 2-D wavelet transform, or D itself. arXiv 2505.12532.

    Each number of D spreads over n × n places with a wavelet of n taps (Haar's has 2): few leave ΔW mostly zero.
    """
    config = checkpoint.config
    spread = _Spread(checkpoint, "waveft_spectrum", 2592)
    scaling, transformed = options.number(config, "scaling", 25), options.flag(config, "use_idwt", True)
    family = str(config.get("wavelet_family", "db1"))
    if transformed and family not in FILTERS:
        raise options.not_served("wavelet_family", family, f"PEFT itself reconstructs {', '.join(FILTERS)} alone")
    low = torch.tensor(FILTERS[family]) if transformed else None

    def one(target: Target, _: Weights) -> None:
        found = spread.of(target)
        change = scaling * (found if low is None else _wave(found, low))
        index = change.nonzero(as_tuple=True)
        if 3 * index[0].numel() < change.numel():
            places = torch.stack(index)
            draft.put(target.name, Sparse(places.int().contiguous(), change[index]))
        else:
            draft.put(target.name, Dense(change.contiguous()))

    each("waveft", one, "waveft")(checkpoint, draft, weights)


def _wave(numbers: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """One level of a 2-D wavelet transform, inverted: quarters [[mean, by rows], [by columns, both]] to all places.

    numbers [out, in], low [n] the low-pass filter. As PEFT does, they stand in the middle of a matrix of even sizes
    that is larger by n − 2, and the result is the middle of what comes out.
    """
    out, into = numbers.shape
    taps = low.shape[0]
    high = low.flip(0) * torch.tensor([1.0, -1.0]).repeat(taps // 2)
    more = [(taps - 2 + size % 2) for size in (into, out)]
    padded = torch.nn.functional.pad(numbers, [side for m in more for side in (m // 2, m - m // 2)])
    quarters = torch.stack([part for half in padded.chunk(2, 0) for part in half.chunk(2, 1)]).unsqueeze(0)
    filters = torch.stack([torch.outer(row, column) for column in (low, high) for row in (low, high)]).unsqueeze(1)
    made = torch.nn.functional.conv_transpose2d(quarters, filters, stride=2)[0, 0]
    return made[taps - 2 :, taps - 2 :][:out, :into].contiguous()


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
