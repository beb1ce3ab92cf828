"""What the kernels of class_centers and car_losses share: a program's pixels, where they lie, and their classes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["classes_of", "flat", "offsets", "wide"]


@triton.jit
def offsets(strides, image, pixel, width, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Of an image's pixels in a map [N, ..., H, W] whose strides end in those of y and x."""
    if WIDE:
        image = image.to(tl.int64)
        pixel = pixel.to(tl.int64)
    if FLAT:  # one row follows the other
        return image * strides[0] + pixel * strides[len(strides) - 1]
    return image * strides[0] + pixel // width * strides[len(strides) - 2] + pixel % width * strides[len(strides) - 1]


@triton.jit
def classes_of(labels, strides, image, pixel, inside, width, ignore_index, K: tl.constexpr, WIDE: tl.constexpr):
    """-1 where a label does not count."""
    label = tl.load(labels + offsets(strides, image, pixel, width, False, WIDE), mask=inside, other=-1).to(tl.int64)
    counts = inside & (label >= 0) & (label < K) & (label != ignore_index)
    return tl.where(counts, label, -1).to(tl.int32)


def flat(x: Tensor) -> bool:
    return x.stride(2) == x.shape[3] * x.stride(3) or x.shape[2] == 1


def wide(*tensors: Tensor) -> bool:
    """Whether offsets need 64 bits."""
    return any(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) >= 2**31 for x in tensors)
