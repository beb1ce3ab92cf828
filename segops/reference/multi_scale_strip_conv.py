"""Depthwise convolution, then pairs of strips over its result (the depthwise part of SegNeXt's MSCA, section 3.1).

    a   = dw_{kh x kw}(x) + b
    out = a + sum_i ( dw_{k_i x 1}( dw_{1 x k_i}(a) + b_i ) + b'_i )

Zero padding keeps H and W. It is applied to the result of the 1 x k convolution, bias included: outside the map that
result is 0, not b_i, so that a pair of strips is not one convolution with a k x k kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._sample import Sample, Shape, Spec

__all__ = ["multi_scale_strip_conv", "sample_inputs"]


def multi_scale_strip_conv(
    x: Tensor, taps: Tensor, biases: Tensor, kernel_size: list[int], strip_lengths: list[int]
) -> Tensor:
    """Returns [N, C, H, W].

    ``taps`` [C, kh kw + 2 sum(k)] are those of the kernel row by row, then 1 x k and k x 1 of each pair; ``biases``
    [C, 1 + 2 pairs] stand in the same order.
    """
    c = x.shape[1]
    shapes = [tuple(kernel_size)] + [shape for k in strip_lengths for shape in ((1, k), (k, 1))]
    weights = taps.split([h * w for h, w in shapes], 1)

    def convolved(x: Tensor, i: int) -> Tensor:
        h, w = shapes[i]
        return F.conv2d(x, weights[i].view(c, 1, h, w), biases[:, i], padding=(h // 2, w // 2), groups=c)

    a = convolved(x, 0)
    out = a
    for i in range(1, len(shapes), 2):
        out = out + convolved(convolved(a, i), i + 1)
    return out


def depthwise(
    shape: Shape, kernel_size: tuple[int, int] = (5, 5), lengths: Sequence[int] = (7, 11, 21), bias: bool = True
) -> dict[str, Spec]:
    """Shapes of x, weight, bias and strips; without biases the last pair of strips still has them."""
    c = shape[1]
    found: dict[str, Spec] = {"x": shape, "weight": (c, 1, *kernel_size)}
    found["bias"] = (c,) if bias else None
    found["strips"] = [
        [(c, 1, 1, k), (c,) if bias or i else None, (c, 1, k, 1), (c,) if bias or i else None]
        for i, k in enumerate(lengths)
    ]
    return found


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, maps smaller than every strip, no strips, no biases, one past every block.

    Not three channels in a long row with 21 taps: there eager PyTorch 2.13 does not return in float16.
    """
    return [
        Sample("one_pixel", depthwise((2, 3, 1, 1), (3, 5), (3,)), tiny=True, scale=0.5),
        Sample("prime_sizes", depthwise((2, 3, 5, 7), (3, 3), (3, 5)), tiny=True, scale=0.5),
        Sample("smaller_than_window", depthwise((1, 2, 2, 3), (3, 1), (7,)), tiny=True, scale=0.5),
        Sample("plain", depthwise((2, 5, 4, 3), (1, 3), (5, 1), bias=False), tiny=True, scale=0.5),
        Sample("no_strips", depthwise((1, 3, 6, 5), (1, 7), ()), tiny=True, scale=0.5),
        Sample("one_tap", depthwise((2, 17, 2, 3), (1, 1), (1,)), tiny=True, scale=0.5),
        Sample("mscan", depthwise((2, 34, 23, 29)), scale=0.3),
        Sample("long_row", depthwise((2, 17, 5, 301), (3, 3), (21, 9)), scale=0.3),
        Sample("tall", depthwise((2, 17, 410, 3), (3, 3), (31,)), scale=0.3),
        Sample("one_past_blocks", depthwise((1, 65, 17, 9), (3, 3), (5,)), scale=0.3),
        Sample("blocks", depthwise((3, 32, 16, 32)), scale=0.3),
    ]
