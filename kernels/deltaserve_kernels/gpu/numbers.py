"""Reading a delta's numbers in whatever dtype it has them; see `board.KINDS`."""

import triton
import triton.language as tl


@triton.jit
def numbers(address, kind, places, mask):
    """fp32: the numbers at `places` of a vector. Where its address is 0 nothing may be live."""
    if kind == 1:
        found = tl.load(address.to(tl.pointer_type(tl.float32)) + places, mask=mask, other=0.0)
    elif kind == 2:
        found = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + places, mask=mask, other=0.0).to(tl.float32)
    else:
        found = tl.load(address.to(tl.pointer_type(tl.float16)) + places, mask=mask, other=0.0).to(tl.float32)
    return found
