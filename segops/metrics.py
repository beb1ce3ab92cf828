"""Scores of label maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ConfusionMatrix", "Scores"]


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says.

    Attributes:
        miou: Mean of the IoU over the classes that have one; NaN without a counted pixel.
        accuracy: Share of counted pixels with the right label; NaN without a counted pixel.
        iou: Intersection over union by class name, NaN for a class that occurs neither in target nor in prediction.
    """

    miou: float
    accuracy: float
    iou: dict[str, float]


class ConfusionMatrix:
    """Counts pixels by target and predicted class, over any number of images.

    Args:
        num_classes: K.
        ignore_index: Target label whose pixels are not counted.
        class_names: K names; None means "0" to "K-1".

    Attributes:
        counts: int64 [K, K] on the CPU, rows are targets, columns predictions.

    Raises:
        ValueError: a number of class_names other than K.

    Example:
        >>> from segops.metrics import ConfusionMatrix
        >>> matrix = ConfusionMatrix(3, class_names=("sky", "road", "car"))
        >>> matrix.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]]))
        >>> matrix.compute()
        Scores(miou=0.5, accuracy=0.6666666666666666, iou={'sky': 0.5, 'road': 0.5, 'car': nan})
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, class_names: Sequence[str] | None = None) -> None:
        names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        if len(names) != num_classes:
            raise ValueError(f"ConfusionMatrix: class_names must be {num_classes} names, got {len(names)}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_names = names
        self.reset()

    def reset(self) -> None:
        """Forgets every pixel."""
        self.counts = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Counts the pixels of one image or batch.

        Args:
            prediction: Labels of any integer dtype and any shape, each in [0, K) where it is counted.
            target: Labels of the same shape, each in [0, K) or ignore_index.

        Raises:
            ValueError: shapes that differ, or a label out of range; nothing is counted then.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"ConfusionMatrix: prediction must have target's shape {tuple(target.shape)}, "
                f"got {tuple(prediction.shape)}"
            )
        target = target.long()
        counted = target != self.ignore_index
        target, prediction = target[counted], prediction.to(target.device).long()[counted]
        for name, labels in (("target", target), ("prediction", prediction)):
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if len(wrong):
                raise ValueError(f"ConfusionMatrix: {name} must be in [0, {self.num_classes}), got {int(wrong[0])}")
        pairs = torch.bincount(target * self.num_classes + prediction, minlength=self.num_classes**2)
        self.counts += pairs.view_as(self.counts).cpu()

    def compute(self) -> Scores:
        """Scores of everything counted so far."""
        right = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        iou = right / union  # 0 / 0 is NaN: a class that occurs nowhere
        return Scores(
            miou=float(iou.nanmean()),
            accuracy=float(right.sum() / self.counts.sum()),
            iou=dict(zip(self.class_names, iou.tolist(), strict=True)),
        )
