"""What a lowering came to must be numbers: finite ones, in float32."""

import torch

from deltaserve.deltas.primitives import LowRank, tensors
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft

_LARGEST = torch.finfo(torch.float32).max


def check_numbers(draft: Draft) -> None:
    """Each number of the file is finite; what a lowering makes of them may not be. Raises BadCheckpoint."""
    for name, primitives in draft.at.items():
        for primitive in primitives:
            scaled = not isinstance(primitive, LowRank) or (abs(primitive.scale) <= _LARGEST and fits(primitive))
            if not scaled or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors(primitive)):
                raise BadCheckpoint(
                    f"the numbers for {name!r} are finite, and what they come to is not in float32; was the training "
                    "stable?",
                    metadata={"module": name},
                )


def fits(part: LowRank) -> bool:
    """Whether inner times A and outer times B are finite in float32."""
    scaled = [(matrix, by.double()) for matrix, by in ((part.a, part.inner), (part.b, part.outer)) if by is not None]
    made = (by @ m.double() if by.ndim == 2 else by * m.abs().amax(1).double() for m, by in scaled)
    return all(bool((product.abs() <= _LARGEST).all()) for product in made)
