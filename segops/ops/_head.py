"""What ops with a weight matrix share: checks of the dupsample ops' arguments, and the layout of small inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ._losses import accumulator

__all__ = ["backward_flops", "check_classes", "check_head", "check_size", "contiguous", "empty_gradients", "flops"]


def check_head(
    function: str, x: Any, weight: Any, bias: Any, scale_factor: Any, temperature: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns weight [r * r * K, C], and temperature as a tensor with one element in the dtype of sums."""
    _checks.tensor(function, "x", x, "[N, C, h, w]")
    if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{function}: x must have C, h, w >= 1, got {tuple(x.shape)}")
    _checks.positive(function, "scale_factor", scale_factor)
    if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    _checks.tensor(function, "weight", weight, "[r * r * K, C]")
    _checks.alike(function, "x", x, "weight", weight)
    rows, channels = weight.shape
    if channels != x.shape[1]:
        raise ValueError(f"{function}: weight must have x's {x.shape[1]} channels on its second axis, got {channels}")
    if rows < 1 or rows % scale_factor**2:
        raise ValueError(
            f"{function}: weight must have a multiple of scale_factor ** 2 = {scale_factor**2} rows, got {rows}"
        )
    if bias is not None:
        _checks.tensor(function, "bias", bias, "[r * r * K]")
        _checks.alike(function, "x", x, "bias", bias)
        if bias.shape[0] != rows:
            raise ValueError(f"{function}: bias must be [{rows}] as weight has rows, got {list(bias.shape)}")
    return weight, _temperature(function, x, temperature)


def _temperature(function: str, x: Tensor, temperature: Any) -> Tensor | None:
    if temperature is None:
        return None
    dtype = accumulator(x.dtype)
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (1,)) or not temperature.is_floating_point():
            raise ValueError(
                f"{function}: temperature must be a number or one floating-point element, [] or [1], "
                f"got {temperature.dtype} {list(temperature.shape)}"
            )
        _checks.on_device(function, "temperature", temperature, x)
        return temperature.to(dtype)
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"{function}: temperature must be a number or a tensor, got {type(temperature).__name__}")
    if temperature == 0 or not math.isfinite(temperature):
        raise ValueError(f"{function}: temperature must be finite and not 0, got {temperature}")
    return None if temperature == 1 else torch.full((), float(temperature), dtype=dtype, device=x.device)


def check_classes(function: str, weight: Tensor, scale_factor: int, alternative: str) -> int:
    """K, which is at least 2."""
    classes = weight.shape[0] // scale_factor**2
    if classes == 1:
        raise ValueError(f"{function}: weight must be for 2 classes or more, got 1: {alternative}")
    return classes


def check_size(function: str, argument: str, x: Tensor, scale_factor: int, size: Sequence[int]) -> None:
    """The last window of each axis may be cropped, not left out."""
    for axis, length, cells in zip("HW", size, x.shape[2:], strict=True):
        if not scale_factor * (cells - 1) < length <= scale_factor * cells:
            raise ValueError(
                f"{function}: {argument} must have {axis} in [{scale_factor * (cells - 1) + 1}, "
                f"{scale_factor * cells}] for {cells} cells and scale_factor={scale_factor}, got {length}"
            )


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias, grad_temperature = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (bias, temperature))
    return torch.empty_like(x), torch.empty_like(weight), grad_bias, grad_temperature


def flops(x: Sequence[int], weight: Sequence[int], *args: Any) -> int:
    """Of the 1x1 convolution, from shapes."""
    return 2 * math.prod(x) * weight[0]


def backward_flops(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any) -> int:
    return 2 * flops(x, weight)


def contiguous(vector: Tensor | None) -> Tensor | None:
    """Kernels read vectors, and centres, without strides."""
    return None if vector is None else vector.contiguous()
