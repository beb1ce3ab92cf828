"""Data-dependent upsampling: one linear map per pixel, whose outputs are a window of r x r pixels.

    z(r i + dy, r j + dx, k) = (sum_c W((dy r + dx) K + k, c) x(i, j, c) + b((dy r + dx) K + k)) / T

cropped at the bottom and on the right to ``size``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import readable
from ._sample import Sample, Shape, Spec, Uniform

__all__ = ["dupsample", "head", "logits", "sample_inputs"]


def dupsample(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, scale_factor: int, size: list[int]
) -> Tensor:
    """Returns [N, K, H, W]."""
    return logits("dupsample", x, weight, bias, temperature, scale_factor, size).to(x.dtype)


def logits(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    scale_factor: int,
    size: list[int],
) -> Tensor:
    """z [N, K, H, W] in float32, or float64."""
    check_temperature(function, temperature)
    n, _, h, w = x.shape
    r, classes = scale_factor, weight.shape[0] // scale_factor**2
    columns = torch.einsum("rc,nchw->nrhw", weight, x)
    columns = columns if bias is None else columns + bias[:, None, None]
    z = columns.view(n, r, r, classes, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, classes, h * r, w * r)
    z = z[:, :, : size[0], : size[1]]
    z = z if z.dtype == torch.float64 else z.float()
    return z if temperature is None else z / temperature.reshape(())


def check_temperature(function: str, temperature: Tensor | None) -> None:
    """Raises the ValueError of a temperature of 0 or NaN, where it can be read without waiting for a GPU."""
    if temperature is not None and temperature.device.type == "cpu" and readable(temperature):
        value = float(temperature.detach())
        if value == 0 or value != value:
            raise ValueError(f"{function}: temperature must be neither 0 nor NaN, got {value}")


def head(
    n: int, channels: int, h: int, w: int, classes: int, r: int, *, bias: bool = True, temperature: Shape | None = ()
) -> dict[str, Spec]:
    """Shapes of x, weight, bias and temperature; the temperature is negative if its shape is [1]."""
    shapes: dict[str, Spec] = {"x": (n, channels, h, w), "weight": (r * r * classes, channels)}
    if bias:
        shapes["bias"] = (r * r * classes,)
    if temperature is not None:
        shapes["temperature"] = Uniform((), 0.6, 1.4) if temperature == () else Uniform((1,), -1.5, -0.7)
    return shapes


def _sample(name: str, shapes: dict[str, Spec], r: int, tiny: bool = False, **kwargs) -> Sample:
    return Sample(name, shapes, {"scale_factor": r, **kwargs}, tiny, differentiable=tuple(shapes))


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, one class beyond the window, primes, crops, no bias, no temperature."""
    return [
        _sample("one_pixel", head(2, 3, 1, 1, 2, 2), 2, tiny=True),
        _sample("prime_sizes", head(2, 3, 3, 5, 3, 2), 2, tiny=True),
        _sample("cropped", head(1, 5, 2, 3, 2, 3, temperature=(1,)), 3, tiny=True, size=(4, 8)),
        _sample("plain", head(1, 2, 3, 2, 5, 2, bias=False, temperature=None), 2, tiny=True),
        _sample("scale_one", head(1, 7, 3, 4, 3, 1, temperature=None), 1, tiny=True),
        _sample("one_class", head(1, 3, 2, 3, 1, 3, bias=False), 3, tiny=True),
        _sample("one_past_blocks", head(1, 17, 3, 17, 9, 4), 4, size=(11, 65)),
        _sample("camvid", head(2, 64, 5, 7, 11, 8), 8),
        _sample("many_classes", head(1, 8, 2, 2, 150, 4, temperature=(1,)), 4),
    ]
