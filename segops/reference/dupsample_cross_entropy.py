"""Cross-entropy of :mod:`dupsample <segops.reference.dupsample>`'s logits, which the fused op never stores."""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import check_labels, cross_entropy
from ._sample import Labels, Sample, Spec, Uniform
from .dupsample import head, logits

__all__ = ["dupsample_cross_entropy", "sample_inputs"]


def dupsample_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    class_weight: Tensor | None,
    scale_factor: int,
    ignore_index: int,
    label_smoothing: float,
    per_pixel: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [N, H, W] or its sum, count [], lse [N, H, W]."""
    name = "dupsample_cross_entropy"
    z = logits(name, x, weight, bias, temperature, scale_factor, list(target.shape[1:]))
    if check:
        check_labels(name, "target", target, z.shape[1], ignore_index)
    return cross_entropy(z, target, class_weight, ignore_index, label_smoothing, per_pixel)


def _sample(
    name: str, shapes: dict[str, Spec], target: Labels, r: int, tiny: bool = False, weighted: bool = False, **kwargs
) -> Sample:
    differentiable = tuple(shapes)
    shapes = {**shapes, "target": target}
    if weighted:
        shapes["class_weight"] = Uniform((target.classes,), 0.4, 2.0)
    return Sample(name, shapes, {"scale_factor": r, **kwargs}, tiny, differentiable=differentiable)


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, crops, every reduction and dtype of labels, weights, smoothing, all ignored."""
    uint8, int16, int32 = torch.uint8, torch.int16, torch.int32
    return [
        _sample("one_pixel", head(2, 3, 1, 1, 2, 2), Labels((2, 2, 2), 2), 2, tiny=True),
        _sample("prime_sizes", head(2, 3, 3, 5, 3, 2), Labels((2, 6, 10), 3, 0.2, uint8), 2, tiny=True, weighted=True,
                label_smoothing=0.1, reduction="none"),
        _sample("cropped", head(1, 5, 2, 3, 2, 3, temperature=(1,)), Labels((1, 4, 8), 2, 0.3, int16, -1), 3,
                tiny=True, weighted=True, ignore_index=-1),
        _sample("plain", head(1, 2, 3, 2, 5, 2, bias=False, temperature=None), Labels((1, 6, 4), 5, 0.1, int32), 2,
                tiny=True, reduction="sum"),
        _sample("scale_one", head(1, 7, 3, 4, 3, 1, temperature=None), Labels((1, 3, 4), 3, 0.4, ignore_index=1), 1,
                tiny=True, ignore_index=1, denominator="all", label_smoothing=0.2),
        _sample("nothing_counted", head(1, 3, 2, 2, 3, 2), Labels((1, 4, 4), 3, 1.0), 2, tiny=True),
        _sample("one_past_blocks", head(1, 17, 3, 17, 9, 4), Labels((1, 11, 65), 9), 4, reduction="none"),
        _sample("camvid", head(2, 64, 5, 7, 11, 8), Labels((2, 40, 56), 11, 0.2, uint8), 8, weighted=True),
        _sample("many_classes", head(1, 8, 2, 2, 150, 4, temperature=(1,)), Labels((1, 8, 7), 150), 4,
                label_smoothing=0.05),
    ]  # fmt: skip
