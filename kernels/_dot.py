"""The matrix product of every kernel that has one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b, float32 in full. The interpreter would multiply the bit patterns of bfloat16.

    float64 is for small tiles only: Triton's own product of it does not take operands that other types led to.
    """
    if acc.dtype == tl.float64:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """x as an operand. The interpreter would cut off what bfloat16 does not hold."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
