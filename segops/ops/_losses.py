"""What ops with labels or sums share: dtype of sums, checks, outputs and reductions of the fused cross-entropies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..reference._losses import label_error

__all__ = ["accumulator", "check_settings", "empty", "empty_labels", "raise_label", "reduced", "why_not"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, losses, statistics, temperature and class weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_settings(
    function: str,
    x: Tensor,
    target: Any,
    classes: int,
    class_weight: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    denominator: Any,
) -> Tensor | None:
    """Checks what the losses have in common, and returns the class weights as the op takes them."""
    _checks.labels(function, "target", target, "[N, H, W]")
    _checks.on_device(function, "target", target, x)
    if target.shape[0] != x.shape[0]:
        raise ValueError(f"{function}: target must be [{x.shape[0]}, H, W], got {tuple(target.shape)}")
    _checks.integer(function, "ignore_index", ignore_index)
    _checks.number(function, "label_smoothing", label_smoothing, 0.0, 1.0)
    _checks.choice(function, "reduction", reduction, ("none", "mean", "sum"))
    _checks.choice(function, "denominator", denominator, ("valid", "all"))
    if class_weight is None:
        return None
    _checks.tensor(function, "class_weight", class_weight, "[K]")
    _checks.on_device(function, "class_weight", class_weight, x)
    if class_weight.shape[0] != classes:
        raise ValueError(f"{function}: class_weight must be [K] = [{classes}], got {list(class_weight.shape)}")
    return class_weight.detach().to(accumulator(x.dtype))


def reduced(loss: Tensor, count: Tensor, target: Tensor, reduction: str, denominator: str) -> Tensor:
    """``loss`` per pixel for "none", else its sum, divided for "mean"; 0 if nothing was counted."""
    if reduction != "mean":
        return loss
    if denominator == "all":
        return loss / max(target.numel(), 1)
    return torch.where(count > 0, loss / count.where(count > 0, 1), 0)


def empty(x: Tensor, target: Tensor, per_pixel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """loss, count and lse, for the fake kernel and for every backend."""
    lse = torch.empty(target.shape, dtype=accumulator(x.dtype), device=x.device)
    return lse.new_empty(target.shape if per_pixel else ()), lse.new_empty(()), lse


def empty_labels(x: Tensor, classes: int, size: list[int], return_confidence: bool) -> tuple[Tensor, Tensor]:
    """labels and confidence of an argmax, for the fake kernel and for every backend."""
    shape = (x.shape[0], size[0], size[1])
    labels = torch.empty(shape, dtype=torch.uint8 if classes <= 255 else torch.int64, device=x.device)
    return labels, torch.empty(shape if return_confidence else 0, dtype=accumulator(x.dtype), device=x.device)


def raise_label(
    function: str, target: Tensor, index: int, classes: int, ignore_index: int, name: str = "target"
) -> None:
    """What a native op that read the labels returned: -1, or the flat index of the first label out of range."""
    if index >= 0:
        raise label_error(function, name, target, index, classes, ignore_index)


def why_not(x: Tensor, *args: Any) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"dtype {x.dtype}"
    return None
