"""What multi_scale_strip_conv and msca share: checks, one table of taps, and its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks

__all__ = [
    "Strip",
    "backward_flops",
    "empty_gradients",
    "empty_like_input",
    "flops",
    "pack",
    "why_not",
    "why_not_backward",
]

Strip = Sequence[Tensor | None]  # 1 x k weight and bias, k x 1 weight and bias


def pack(
    function: str, x: Tensor, weight: Tensor, bias: Tensor | None, strips: Sequence[Strip]
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Checks the arguments, and returns them as the op takes them: taps [C, K], biases [C, 1 + 2 pairs], kernel size
    and strip lengths (reference/multi_scale_strip_conv.py says in what order)."""
    _checks.tensor(function, "x", x, "[N, C, H, W]")
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{function}: x must have C, H, W >= 1, got {tuple(x.shape)}")
    c = x.shape[1]
    _depthwise(function, "weight", weight, x)
    taps, biases = [weight], [_bias(function, "bias", bias, x)]
    if not isinstance(strips, Sequence):
        raise TypeError(f"{function}: strips must be a sequence of (w_1xk, b, w_kx1, b), got {type(strips).__name__}")
    for i, strip in enumerate(strips):
        if not isinstance(strip, Sequence) or len(strip) != 4:
            raise TypeError(
                f"{function}: strips[{i}] must be (w_1xk, bias or None, w_kx1, bias or None), got {strip!r}"
            )
        across, across_bias, down, down_bias = strip
        taps.append(_depthwise(function, f"strips[{i}][0]", across, x, height=1))
        taps.append(_depthwise(function, f"strips[{i}][2]", down, x, int(taps[-1].shape[3]), 1))
        biases += [_bias(function, f"strips[{i}][{j}]", b, x) for j, b in ((1, across_bias), (3, down_bias))]
    lengths = [int(w.shape[3]) for w in taps[1::2]]
    return (
        torch.cat([w.reshape(c, -1) for w in taps], 1),
        torch.stack(biases, 1),
        [int(k) for k in weight.shape[2:]],
        lengths,
    )


def _depthwise(
    function: str, name: str, weight: Any, x: Tensor, height: int | None = None, width: int | None = None
) -> Tensor:
    """A weight of the given size, odd where there is none."""
    c = x.shape[1]
    _checks.tensor(function, name, weight, f"[{c}, 1, {height or 'odd'}, {width or 'odd'}]")
    kh, kw = (int(k) for k in weight.shape[2:])
    fits = kh == (height or kh) and kw == (width or kw) and kh % 2 == 1 and kw % 2 == 1
    if weight.shape[0] != c or weight.shape[1] != 1 or not fits:
        expected = f"[{c}, 1, {height or 'odd'}, {width or 'odd'}]"
        raise ValueError(f"{function}: {name} must be {expected}, got {tuple(weight.shape)}")
    _checks.alike(function, "x", x, name, weight)
    return weight


def _bias(function: str, name: str, bias: Tensor | None, x: Tensor) -> Tensor:
    if bias is None:
        return x.new_zeros(x.shape[1])
    _checks.tensor(function, name, bias, f"[{x.shape[1]}]")
    if bias.shape[0] != x.shape[1]:
        raise ValueError(f"{function}: {name} must be [{x.shape[1]}], got {tuple(bias.shape)}")
    _checks.alike(function, "x", x, name, bias)
    return bias


def empty_like_input(x: Tensor) -> Tensor:
    """A map of x's shape, channels_last if x is."""
    channels_last = x.shape[1] > 1 and x.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def empty_gradients(x: Tensor, taps: Tensor, biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_input(x), torch.empty_like(taps), torch.empty_like(biases)


def why_not(x: Tensor, *args: Any) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"dtype {x.dtype}"
    return None


def why_not_backward(grad_out: Tensor, *args: Any) -> str | None:
    return why_not(grad_out)


def flops(x: Sequence[int], kernel_size: Sequence[int], strip_lengths: Sequence[int]) -> int:
    """Of the convolutions, as torch.utils.flop_counter counts them."""
    return 2 * math.prod(x) * sum(h * w for h, w in _windows(kernel_size, strip_lengths))


def backward_flops(x: Sequence[int], kernel_size: Sequence[int], strip_lengths: Sequence[int]) -> int:
    """Of the convolutions' gradients: torch's own formula, which counts depthwise weight gradients as full ones."""
    from torch.utils.flop_counter import conv_backward_flop  # imports triton

    where = ([1, 1], [0, 0], [1, 1], False, [0, 0], x[1], [True, True, False])
    weights = [[x[1], 1, h, w] for h, w in _windows(kernel_size, strip_lengths)]
    count: Any = conv_backward_flop
    return sum(count(list(x), list(x), w, None, *where, out_val=(list(x), w)) for w in weights)


def _windows(kernel_size: Sequence[int], strip_lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(kernel_size[0], kernel_size[1]), *(window for k in strip_lengths for window in ((1, k), (k, 1)))]
