"""The matrix product of every kernel that has one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b, float32 in full. The interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRET:
        if a.dtype == tl.bfloat16:
            return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
