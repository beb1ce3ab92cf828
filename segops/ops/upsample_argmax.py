"""Argmax of bilinearly upsampled logits: the public function, then the op behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._dispatch import Compiled, Op
from ..reference.upsample_argmax import upsample_argmax as reference
from ._losses import empty_labels, why_not

__all__ = ["upsample_argmax"]

NAME = "upsample_argmax"


@overload
def upsample_argmax(
    logits: Tensor | Sequence[Tensor],
    size: int | tuple[int, int] | None = None,
    *,
    scale_factor: float | None = None,
    align_corners: bool = False,
    return_confidence: Literal[False] = False,
) -> Tensor: ...


@overload
def upsample_argmax(
    logits: Tensor | Sequence[Tensor],
    size: int | tuple[int, int] | None = None,
    *,
    scale_factor: float | None = None,
    align_corners: bool = False,
    return_confidence: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def upsample_argmax(
    logits: Tensor | Sequence[Tensor],
    size: int | tuple[int, int] | None = None,
    *,
    scale_factor: float | None = None,
    align_corners: bool = False,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of the largest of bilinearly upsampled logits, fused: full-size logits are never stored.

    For a tensor equal to ``torch.nn.functional.interpolate(logits, size, mode="bilinear",
    align_corners=align_corners).argmax(1)``. For a list (several scales, mirrored images) each is upsampled to ``size``
    and the mean of the softmaxes decides.

    Args:
        logits: [N, K, h, w], any strides, K >= 2; float16, bfloat16, float32 or float64. Or a list of such, with N, K
            and the dtype in common and sizes of their own.
        size: (H, W) of the output, or one int for both; larger or smaller than h and w.
        scale_factor: In place of size: H = floor(h * scale_factor), of the first of a list; the same for W. The scale
            of the interpolation is that of the sizes.
        align_corners: Corner convention of the interpolation; False is half-pixel, with clamped borders.
        return_confidence: Also return the (mean) softmax probability of the class.

    Returns:
        labels [N, H, W], uint8 if K <= 255, else int64; the lowest class of a tie. With ``return_confidence`` also
        confidence [N, H, W], float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, K = 1, an empty list, or not one of size and scale_factor.
        TypeError: dtypes that differ, or are not floating-point.

    There is no gradient. The result is the same on every run; everything runs in float32 (float64 for float64), under
    autocast too. Backends: C++ (CPU), Triton (GPU); ``segops.explain`` says which.

    Example:
        >>> logits = torch.randn(2, 19, 16, 32)
        >>> mirrored = torch.randn(2, 19, 16, 32)
        >>> segops.upsample_argmax([logits, mirrored.flip(3)], scale_factor=8).shape
        torch.Size([2, 128, 256])
    """
    maps = [logits] if isinstance(logits, Tensor) else logits
    if not isinstance(maps, (list, tuple)) or not maps:
        raise ValueError(f"{NAME}: logits must be a tensor or a list of at least one, got {logits!r}")
    for i, z in enumerate(maps):
        argument = "logits" if isinstance(logits, Tensor) else f"logits[{i}]"
        _checks.tensor(NAME, argument, z, "[N, K, h, w]")
        first = maps[0]
        if z.shape[:2] != first.shape[:2] or z.dtype != first.dtype or z.device != first.device:
            raise ValueError(
                f"{NAME}: {argument} must have the N, K, dtype and device of logits[0], {tuple(first.shape[:2])} "
                f"{first.dtype} {first.device}, got {tuple(z.shape[:2])} {z.dtype} {z.device}"
            )
        if z.shape[2] < 1 or z.shape[3] < 1:
            raise ValueError(f"{NAME}: {argument} must have h, w >= 1, got {tuple(z.shape)}")
    if maps[0].shape[1] < 2:
        raise ValueError(
            f"{NAME}: logits must have 2 classes or more, got {maps[0].shape[1]}: for one logit per pixel take "
            "torch.nn.functional.interpolate(...) > 0"
        )
    labels, confidence = OP(list(maps), list(_size(maps[0], size, scale_factor)), align_corners, return_confidence)
    return (labels, confidence) if return_confidence else labels


def _size(logits: Tensor, size: Any, scale_factor: Any) -> tuple[int, int]:
    if (size is None) == (scale_factor is None):
        raise ValueError(
            f"{NAME}: one of size and scale_factor must be given, got size={size!r}, scale_factor={scale_factor!r}"
        )
    if size is not None:
        return _checks.pair(NAME, "size", size)
    if not isinstance(scale_factor, (int, float)) or isinstance(scale_factor, bool):
        raise TypeError(f"{NAME}: scale_factor must be a number, got {scale_factor!r}")
    height, width = (math.floor(length * scale_factor) for length in logits.shape[2:])
    if not (height >= 1 and width >= 1):
        raise ValueError(f"{NAME}: scale_factor must leave a pixel, got {scale_factor} for {tuple(logits.shape)}")
    return height, width


def _empty(logits, size, align_corners, return_confidence):
    return empty_labels(logits[0], logits[0].shape[1], size, return_confidence)


def _why_not(logits: Sequence[Tensor], *args: Any) -> str | None:
    return why_not(logits[0])


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(logits, size, align_corners, return_confidence):
        outputs = _empty(logits, size, align_corners, return_confidence)
        compiled.upsample_argmax(*outputs, logits, align_corners)
        return outputs

    return run


def _triton(logits, size, align_corners, return_confidence):
    outputs = _empty(logits, size, align_corners, return_confidence)
    _dispatch.kernels(NAME).forward(*outputs, logits, align_corners)
    return outputs


OP = Op(
    NAME,
    "(Tensor[] logits, SymInt[2] size, bool align_corners, bool return_confidence) -> (Tensor, Tensor)",
    reference=reference,
    fake=_empty,
    backends=_dispatch.backends(
        native=Compiled(NAME, _native),
        triton=_triton,
        cuda="no CUDA C++: no halo and no gather, nothing that Triton does badly",
        why_not=_why_not,
    ),
)
OP.register_no_gradient()
