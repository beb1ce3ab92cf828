"""The most likely class of :mod:`dupsample <segops.reference.dupsample>`'s logits."""

from __future__ import annotations

from torch import Tensor

from . import dupsample
from ._losses import winner
from ._sample import Sample
from .dupsample import logits

__all__ = ["dupsample_argmax", "sample_inputs"]


def dupsample_argmax(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    scale_factor: int,
    size: list[int],
    return_confidence: bool,
) -> tuple[Tensor, Tensor]:
    """Returns labels [N, H, W] and their softmax probability [N, H, W], or [0]."""
    z = logits("dupsample_argmax", x, weight, bias, temperature, scale_factor, size)
    return winner(z, z.softmax(1).amax(1) if return_confidence else None)


def sample_inputs() -> list[Sample]:
    """Those of dupsample, with the confidence."""
    return [
        Sample(sample.name, sample.shapes, {**sample.kwargs, "return_confidence": True}, sample.tiny, differentiable=())
        for sample in dupsample.sample_inputs()
        if sample.name != "one_class"
    ]
