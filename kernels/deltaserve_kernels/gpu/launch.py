"""What launchers share: dtypes as Triton knows them, and which of them a batch has."""

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

from deltaserve_kernels.slots import Entry

TYPES: Mapping[torch.dtype, tl.dtype] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def kinds(entries: Iterable[Entry], column: int = 0) -> list[torch.dtype]:
    """The dtypes of the entries' tensors in a column, each once: one launch serves one."""
    found = (entry.tensors[column] for entry in entries)
    return list(dict.fromkeys(t.dtype for t in found if t is not None))


def on_tensor_cores(rows: torch.dtype, weights: torch.dtype) -> bool:
    """Whether rows meet weights as they are: both are of one half dtype.

    Not for bfloat16 in Triton's interpreter, whose product of it is wrong: it multiplies the bits (3.7).
    """
    wrong = triton.knobs.runtime.interpret and rows == torch.bfloat16
    return rows == weights != torch.float32 and not wrong


def precision(weights: torch.dtype) -> str:
    """How an fp32 row meets weights of a dtype: halves are exact in TF32, and three products make the row exact too."""
    return "ieee" if weights == torch.float32 or torch.version.hip else "tf32x3"


def power(number: int) -> int:
    """The next power of two, 16 at least: what a side of a product on tensor cores has."""
    return max(16, 1 << (number - 1).bit_length())
