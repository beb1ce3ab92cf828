"""The most likely class of bilinearly upsampled logits, or of the mean of the softmaxes of several such."""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import winner
from ._sample import Sample, Shape
from .upsample_cross_entropy import bilinear

__all__ = ["sample_inputs", "upsample_argmax"]


def upsample_argmax(
    logits: list[Tensor], size: list[int], align_corners: bool, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    """Returns labels [N, H, W] and their probability [N, H, W], or [0]."""
    maps = [bilinear(z, size, align_corners) for z in logits]
    if len(maps) == 1:
        return winner(maps[0], maps[0].softmax(1).amax(1) if return_confidence else None)
    mean = torch.stack([z.softmax(1) for z in maps]).mean(0)
    return winner(mean, mean.amax(1) if return_confidence else None)


def _sample(name: str, shape: Shape | list[Shape], tiny: bool = False, **kwargs) -> Sample:
    return Sample(name, {"logits": shape}, {"return_confidence": True, **kwargs}, tiny, differentiable=())


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, both corner conventions, up and down, several scales."""
    corners = {"align_corners": True}
    return [
        _sample("one_pixel", (2, 3, 1, 1), tiny=True, size=(2, 3)),
        _sample("prime_sizes", (2, 3, 3, 5), tiny=True, scale_factor=3),
        _sample("corners", (1, 5, 3, 4), tiny=True, size=(9, 13), **corners),
        _sample("downwards", (1, 4, 7, 9), tiny=True, scale_factor=0.5),
        _sample("three_scales", [(1, 3, 2, 3), (1, 3, 4, 4), (1, 3, 7, 5)], tiny=True, size=(6, 8)),
        _sample("two_scales_corners", [(2, 2, 3, 3), (2, 2, 2, 5)], tiny=True, size=(5, 7), **corners),
        _sample("one_past_blocks", (1, 17, 9, 17), size=(33, 65)),
        _sample("cityscapes", (1, 19, 8, 16), scale_factor=8),
        _sample("many_classes", (1, 300, 6, 5), size=(20, 21)),
    ]
