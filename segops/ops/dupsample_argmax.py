"""Argmax of data-dependent upsampling: the public function, then the op behind it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._dispatch import Compiled, Op
from ..reference.dupsample import check_temperature
from ..reference.dupsample_argmax import dupsample_argmax as reference
from ._head import check_classes, check_head, check_size, contiguous, flops
from ._losses import empty_labels, why_not

__all__ = ["dupsample_argmax"]

NAME = "dupsample_argmax"


@overload
def dupsample_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale_factor: int,
    temperature: Tensor | float | None = None,
    size: int | tuple[int, int] | None = None,
    return_confidence: Literal[False] = False,
) -> Tensor: ...


@overload
def dupsample_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale_factor: int,
    temperature: Tensor | float | None = None,
    size: int | tuple[int, int] | None = None,
    return_confidence: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def dupsample_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale_factor: int,
    temperature: Tensor | float | None = None,
    size: int | tuple[int, int] | None = None,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of the largest of :func:`segops.dupsample`'s logits, fused: they are never stored.

    Equal to ``segops.dupsample(x, weight, bias, ...).argmax(1)`` (DUpsampling, section 3.1).

    Args:
        x: [N, C, h, w], any strides; float16, bfloat16, float32 or float64.
        weight: [r * r * K, C] or [r * r * K, C, 1, 1], x's dtype; row ``(dy r + dx) K + k`` is class k of pixel
            (dy, dx) of the window. K >= 2.
        bias: [r * r * K], x's dtype.
        scale_factor: r, pixels per cell and axis.
        temperature: A number, or one element [] or [1]; not 0. A negative one turns the argmax into an argmin. None
            means 1.
        size: (H, W) of the output, or one int for both; r (h - 1) < H <= r h and the same for W. The map is cropped
            at the bottom and on the right. None means (r h, r w).
        return_confidence: Also return the softmax probability of the class.

    Returns:
        labels [N, H, W], uint8 if K <= 255, else int64; the lowest class of a tie. With ``return_confidence`` also
        confidence [N, H, W], float32 (float64 for float64).

    Raises:
        ValueError: as :func:`segops.dupsample`, and K = 1.
        TypeError: dtypes that differ, or are not floating-point.

    There is no gradient. The result is the same on every run. Backends: C++ (CPU), Triton (GPU); ``segops.explain``
    says which. Under autocast x, weight and bias are cast to the autocast dtype.

    Example:
        >>> x, weight = torch.randn(2, 64, 9, 13), torch.randn(8 * 8 * 21, 64)
        >>> labels = segops.dupsample_argmax(x, weight, scale_factor=8)
        >>> labels.shape, labels.dtype
        (torch.Size([2, 72, 104]), torch.uint8)
    """
    weight, temperature = check_head(NAME, x, weight, bias, scale_factor, temperature)
    check_classes(NAME, weight, scale_factor, "for one logit per pixel take segops.dupsample(...) > 0")
    if size is None:
        size = (x.shape[2] * scale_factor, x.shape[3] * scale_factor)
    else:
        size = _checks.pair(NAME, "size", size)
        check_size(NAME, "size", x, scale_factor, size)
    labels, confidence = OP(x, weight, bias, temperature, scale_factor, list(size), return_confidence)
    return (labels, confidence) if return_confidence else labels


def _empty(x, weight, bias, temperature, scale_factor, size, return_confidence):
    return empty_labels(x, weight.shape[0] // scale_factor**2, size, return_confidence)


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(x, weight, bias, temperature, scale_factor, size, return_confidence):
        check_temperature(NAME, temperature)
        outputs = _empty(x, weight, bias, temperature, scale_factor, size, return_confidence)
        compiled.dupsample_argmax(*outputs, x, weight, contiguous(bias), temperature, scale_factor)
        return outputs

    return run


def _triton(x, weight, bias, temperature, scale_factor, size, return_confidence):
    check_temperature(NAME, temperature)
    outputs = _empty(x, weight, bias, temperature, scale_factor, size, return_confidence)
    _dispatch.kernels(NAME).forward(*outputs, x, weight, contiguous(bias), temperature, scale_factor)
    return outputs


OP = Op(
    NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? temperature, int scale_factor, SymInt[2] size, "
    "bool return_confidence) -> (Tensor, Tensor)",
    reference=reference,
    fake=_empty,
    backends=_dispatch.backends(
        native=Compiled(NAME, _native),
        triton=_triton,
        cuda="no CUDA C++: its matrix product wants tensor cores, which are Triton's",
        why_not=why_not,
    ),
    autocast=("x", "weight", "bias"),
    flops=flops,
)
OP.register_no_gradient()
