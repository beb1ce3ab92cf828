"""How often each class was predicted for each target class.

counts(t, p) = number of pixels with target t and prediction p, where the target is counted
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import check_labels, counted, label_error, readable
from ._sample import Labels, Sample

__all__ = ["check_pairs", "confusion_matrix", "sample_inputs"]


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int, check: bool) -> Tensor:
    """Returns int64 [K, K], rows are targets."""
    if check:
        check_pairs(prediction, target, num_classes, ignore_index)
    valid = counted(target, num_classes, ignore_index) & (prediction.long() >= 0) & (prediction.long() < num_classes)
    pairs = (target.long() * num_classes + prediction.long()).where(valid, 0)
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=target.device)
    return counts.index_add(0, pairs.flatten(), valid.flatten().long()).view(num_classes, num_classes)


def check_pairs(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises the ValueError of a target out of range, or of a prediction out of range where the target is counted."""
    check_labels("confusion_matrix", "target", target, num_classes, ignore_index)
    if readable(prediction) and readable(target):
        labels = prediction.long()
        wrong = ((labels < 0) | (labels >= num_classes)) & (target.long() != ignore_index)
        if wrong.any():
            at = int(wrong.flatten().int().argmax())
            raise label_error("confusion_matrix", "prediction", prediction, at, num_classes, None)


def _sample(
    name: str, shape: tuple[int, ...], classes: int, dtypes: tuple[torch.dtype, torch.dtype], **kwargs
) -> Sample:
    predicted, true = dtypes
    target = Labels(shape, classes, 0.2, true, kwargs.get("ignore_index", 255))
    shapes = {"prediction": Labels(shape, classes, 0.0, predicted), "target": target}
    return Sample(name, shapes, {"num_classes": classes, **kwargs}, tiny=True, differentiable=())


def sample_inputs() -> list[Sample]:
    """One pixel, primes, pairs of dtypes, more classes than fit a cache line."""
    uint8, int16, int32, int64 = torch.uint8, torch.int16, torch.int32, torch.int64
    return [
        _sample("one_pixel", (1, 1, 1), 2, (uint8, uint8)),
        _sample("prime_sizes", (2, 5, 7), 3, (uint8, int64)),
        _sample("ignore_a_class", (1, 11, 13), 5, (int64, int16), ignore_index=2),
        _sample("ignore_negative", (2, 9, 4), 4, (int16, int32), ignore_index=-1),
        _sample("cityscapes", (2, 33, 65), 19, (uint8, uint8)),
        _sample("many_classes", (1, 40, 50), 300, (int64, int32), ignore_index=1000),
    ]
