"""Multi-scale convolutional attention (SegNeXt, section 3.1): strips, a 1x1 convolution, and a gate.

s    = multi_scale_strip_conv(x)
gate = W3 s + b3
out  = gate * x
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._sample import Sample, Shape, Spec
from .multi_scale_strip_conv import depthwise, multi_scale_strip_conv

__all__ = ["msca", "sample_inputs"]


def msca(
    x: Tensor,
    taps: Tensor,
    biases: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    kernel_size: list[int],
    strip_lengths: list[int],
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [N, C, H, W]; and s and the gate, which backward reads, or two [0] unless ``training``."""
    s = multi_scale_strip_conv(x, taps, biases, kernel_size, strip_lengths)
    gate = F.conv2d(s, proj_weight[:, :, None, None], proj_bias)
    return (gate * x, s, gate) if training else (gate * x, x.new_empty(0), x.new_empty(0))


def _sample(name: str, shape: Shape, *args, tiny: bool = False, proj_bias: bool = True, **kwargs) -> Sample:
    c = shape[1]
    shapes: dict[str, Spec] = depthwise(shape, *args, **kwargs)
    shapes["proj_weight"] = (c, c) if tiny else (c, c, 1, 1)
    shapes["proj_bias"] = (c,) if proj_bias else None
    return Sample(name, shapes, tiny=tiny, scale=0.5 if tiny else 0.2)


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, maps smaller than every strip, no biases, one past every block."""
    return [
        _sample("one_pixel", (2, 3, 1, 1), (3, 5), (3,), tiny=True),
        _sample("prime_sizes", (2, 3, 5, 7), (3, 3), (3, 5), tiny=True),
        _sample("smaller_than_window", (1, 2, 2, 3), (3, 1), (7,), tiny=True),
        _sample("plain", (2, 5, 4, 3), (1, 3), (5, 1), bias=False, proj_bias=False, tiny=True),
        _sample("one_channel", (2, 1, 6, 5), (3, 3), (), tiny=True),
        _sample("mscan", (2, 34, 23, 29)),
        _sample("one_past_blocks", (1, 65, 17, 9), (3, 3), (5,), proj_bias=False),
        _sample("blocks", (3, 32, 16, 32)),
    ]
