"""Sums of a feature map over the pixels of each class, which divided by the counts are the class centres (CAR).

S_k = sum of x_p over the pixels p of class k,  c_k = how many there are;  over the batch, or per image
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import check_labels, counted
from ._sample import Labels, Sample, Shape, Spec

__all__ = ["class_centers", "nearest", "sample_inputs"]


def class_centers(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, per_image: bool, check: bool
) -> tuple[Tensor, Tensor]:
    """Returns sums [K, C] or [N, K, C] in float32 or float64, counts int64 [K] or [N, K]; labels [N, H, W]."""
    if check:
        check_labels("class_centers", "labels", labels, num_classes, ignore_index)
    n, c = features.shape[:2]
    x = features if features.dtype == torch.float64 else features.float()
    rows = labels.long().where(counted(labels, num_classes, ignore_index), num_classes)
    groups = n if per_image else 1
    if per_image:
        rows = rows + (num_classes + 1) * torch.arange(n, device=rows.device)[:, None, None]
    rows = rows.flatten()
    sums = x.new_zeros(groups * (num_classes + 1), c).index_add(0, rows, x.permute(0, 2, 3, 1).reshape(-1, c))
    counts = torch.zeros_like(sums[:, 0], dtype=torch.int64).index_add(0, rows, torch.ones_like(rows))
    sums = sums.view(groups, num_classes + 1, c)[:, :num_classes]
    counts = counts.view(groups, num_classes + 1)[:, :num_classes]
    return (sums, counts) if per_image else (sums[0], counts[0])


def nearest(labels: Tensor, height: int, width: int) -> Tensor:
    """[N, H, W] -> [N, height, width]; index i reads floor(i (H - 1) / (height - 1) + 1/2), 0 where height is 1."""
    for axis, size in ((1, height), (2, width)):
        last, steps = labels.shape[axis] - 1, max(size - 1, 1)
        index = torch.arange(size, device=labels.device)
        labels = labels.index_select(axis, (2 * last * index + steps) // (2 * steps))
    return labels


def _sample(name: str, shape: Shape, labels: Labels, tiny: bool = True, **kwargs) -> Sample:
    shapes: dict[str, Spec] = {"features": shape, "labels": labels}
    return Sample(name, shapes, {"num_classes": labels.classes, **kwargs}, tiny, differentiable=("features",))


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, larger labels, absent classes, long runs, one past every vector and block."""
    uint8, int16, int32 = torch.uint8, torch.int16, torch.int32
    return [
        _sample("one_pixel", (2, 3, 1, 1), Labels((2, 1, 1), 2, 0.0)),
        _sample("prime_sizes", (2, 5, 3, 7), Labels((2, 3, 7), 3, 0.2, uint8)),
        _sample("per_image", (3, 4, 5, 3), Labels((3, 5, 3), 4, 0.3, int16, -1), per_image=True, ignore_index=-1),
        _sample("larger_labels", (1, 6, 3, 4), Labels((1, 11, 13), 3, 0.2, int32)),
        _sample("to_one_row", (2, 3, 1, 5), Labels((2, 4, 9), 2)),
        _sample("nothing_counted", (2, 3, 2, 2), Labels((2, 2, 2), 3, 1.0)),
        _sample("ignored_class", (1, 17, 4, 9), Labels((1, 4, 9), 5, 0.3, ignore_index=2), ignore_index=2),
        _sample("absent_classes", (1, 33, 5, 7), Labels((1, 5, 7), 150, 0.1, uint8), False),
        _sample("one_past_vectors", (1, 17, 3, 11), Labels((1, 3, 11), 3), False, per_image=True),
        _sample("one_past_blocks", (1, 65, 5, 103), Labels((1, 5, 103), 33, 0.2, uint8), False),
        _sample("many_rows", (2, 3, 67, 65), Labels((2, 67, 65), 2, 0.1, uint8), False),
    ]
