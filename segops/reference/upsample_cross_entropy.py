"""Cross-entropy of bilinearly upsampled logits, which the fused op never stores.

Bilinear is that of ``torch.nn.functional.interpolate``, with scales taken from the sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._losses import check_labels, cross_entropy
from ._sample import Labels, Sample, Shape, Spec, Uniform

__all__ = ["bilinear", "sample_inputs", "upsample_cross_entropy"]


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    per_pixel: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [N, H, W] or its sum, count [], lse [N, H, W]."""
    if check:
        check_labels("upsample_cross_entropy", "target", target, logits.shape[1], ignore_index)
    z = bilinear(logits, list(target.shape[1:]), align_corners)
    return cross_entropy(z, target, class_weight, ignore_index, label_smoothing, per_pixel)


def bilinear(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    """[N, K, h, w] -> [N, K, H, W] in float32, or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def _sample(name: str, shape: Shape, target: Labels, tiny: bool = False, weighted: bool = False, **kwargs) -> Sample:
    shapes: dict[str, Spec] = {"logits": shape, "target": target}
    if weighted:
        shapes["class_weight"] = Uniform((target.classes,), 0.4, 2.0)
    return Sample(name, shapes, kwargs, tiny, differentiable=("logits",))


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, both corner conventions, up, down and neither, every reduction, OHEM."""
    uint8, int16, int32 = torch.uint8, torch.int16, torch.int32
    corners = {"align_corners": True}
    return [
        _sample("one_pixel", (2, 3, 1, 1), Labels((2, 2, 3), 3), tiny=True),
        _sample("prime_sizes", (2, 3, 3, 5), Labels((2, 7, 11), 3, 0.2, uint8), tiny=True, weighted=True,
                label_smoothing=0.1, reduction="none"),
        _sample("corners", (1, 5, 3, 4), Labels((1, 9, 13), 5, 0.2, int16, -1), tiny=True, weighted=True,
                ignore_index=-1, **corners),
        _sample("corners_to_one_pixel", (1, 3, 4, 3), Labels((1, 1, 5), 3, 0.0), tiny=True, **corners),
        _sample("downwards", (1, 4, 7, 9), Labels((1, 3, 4), 4, 0.1, int32), tiny=True, reduction="sum"),
        _sample("downwards_corners", (2, 2, 6, 7), Labels((2, 5, 3), 2, 0.1), tiny=True, **corners),
        _sample("same_size", (1, 3, 4, 5), Labels((1, 4, 5), 3, 0.3, ignore_index=1), tiny=True, ignore_index=1,
                denominator="all", label_smoothing=0.2),
        _sample("hard_pixels", (2, 3, 3, 4), Labels((2, 6, 8), 3, 0.2), tiny=True, weighted=True, ohem_threshold=0.2,
                ohem_min_kept=20),
        _sample("nothing_counted", (1, 3, 2, 2), Labels((1, 4, 4), 3, 1.0), tiny=True),
        _sample("one_past_blocks", (1, 17, 9, 17), Labels((1, 33, 65), 17), reduction="none"),
        _sample("cityscapes", (1, 19, 5, 9), Labels((1, 40, 72), 19, 0.2, uint8), weighted=True),
        _sample("many_classes", (1, 150, 3, 4), Labels((1, 12, 15), 150), label_smoothing=0.05, **corners),
    ]  # fmt: skip
