"""Activations in kernels: by the number that `deltaserve_kernels.activations.number_of` gives."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HALF_ROOT = tl.constexpr(0.7071067811865476)
ROOT = tl.constexpr(0.7978845608028654)
"""√(2/π)."""


@triton.jit
def least(x, bound):
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def most(x, bound):
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(most(x, -87.0) * -LOG2E))


@triton.jit
def tanh(x):
    """1 − 2 / (e²ˣ + 1), and near 0, where that loses digits, four terms of the series."""
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315))))
    return tl.where(s < 0.015625, near, 1.0 - 2.0 / (tl.exp2(least(x, 20.0) * (2 * LOG2E)) + 1.0))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * HALF_ROOT))


@triton.jit
def mish(x):
    """x · tanh(log(1 + eˣ)), as a fraction in eˣ, which cancels nothing; x itself where that is 1 to the last bit."""
    e = tl.exp2(least(x, 20.0) * LOG2E)
    n = e * (e + 2.0)
    return tl.where(x > 20.0, x, x * (n / (n + 2.0)))


@triton.jit
def activated(x, number):
    """f(x), fp32. One number for the whole tile, so that a program walks one of the branches.

    They stand side by side, none within another: nested as deep as this they cost registers.
    """
    if number == 1:
        x = most(x, 0.0)
    if number == 2:
        x = most(x, 0.0) * most(x, 0.0)
    if number == 3:
        x = least(most(x, 0.0), 6.0)
    if number == 4:
        x = tl.where(x < 0.0, 0.01 * x, x)
    if number == 5:
        x = gelu(x)
    if number == 6:
        x = x * sigmoid((x + 0.044715 * x * x * x) * (2 * ROOT))
    if number == 7:
        x = least(most(gelu(x), -10.0), 10.0)
    if number == 8:
        x = x * sigmoid(1.702 * x)
    if number == 9:
        x = x * sigmoid(x)
    if number == 10:
        x = mish(x)
    if number == 11:
        x = 0.5 * (1.0 + tl.erf((x - 0.707107) * 2.506626424383798))
    if number == 12:
        x = sigmoid(x)
    if number == 13:
        x = tanh(x)
    return x
