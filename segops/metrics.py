"""Scores of label maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.confusion_matrix import confusion_matrix

__all__ = ["ConfusionMatrix", "Scores"]


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says. Each is NaN without a counted pixel.

    Attributes:
        miou: Mean of the IoU over the classes that have one.
        accuracy: Share of counted pixels with the right label.
        mean_accuracy: Mean, over the classes that occur in the target, of the share of their pixels with the right
            label.
        dice: Mean of 2 IoU / (1 + IoU), the Dice coefficient or F1 score, over the classes that have one.
        iou: Intersection over union by class name, NaN for a class that occurs neither in target nor in prediction.
    """

    miou: float
    accuracy: float
    mean_accuracy: float
    dice: float
    iou: dict[str, float]


class ConfusionMatrix:
    """Counts pixels by target and predicted class, over any number of images and processes.

    Args:
        num_classes: K.
        ignore_index: Target label whose pixels are not counted.
        class_names: K names; None means "0" to "K-1".

    Attributes:
        counts: int64 [K, K], rows are targets, columns predictions; on the device of the last update.

    Raises:
        ValueError: a number of class_names other than K.

    Example:
        >>> from segops.metrics import ConfusionMatrix
        >>> matrix = ConfusionMatrix(3, class_names=("sky", "road", "car"))
        >>> matrix.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]]))
        >>> scores = matrix.compute()
        >>> scores.miou, scores.iou
        (0.5, {'sky': 0.5, 'road': 0.5, 'car': nan})
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
        """Counts the pixels of one image or batch, with :func:`segops.confusion_matrix`.

        Args:
            prediction: Labels of any shape, uint8, int16, int32 or int64, each in [0, K) where it is counted.
            target: Labels of the same shape, each in [0, K) or ignore_index; counting runs on its device.

        Raises:
            ValueError: shapes that differ, or (on the CPU) a label out of range; nothing is counted then.
            TypeError: dtypes that are not one of the four.
        """
        prediction = prediction.to(target.device)
        counts = confusion_matrix(prediction, target, self.num_classes, ignore_index=self.ignore_index)
        self.counts = self.counts.to(counts.device) + counts

    def sync(self, group: Any = None) -> None:
        """Adds up the counts of all processes of ``group``, so that each has the total; nothing without processes.

        To be called once, when all updates are made: a second call would add up totals.

        Args:
            group: A ``torch.distributed`` process group; None means the default one.
        """
        if dist.is_available() and dist.is_initialized():
            counts = self.counts.cuda() if "nccl" in dist.get_backend(group) else self.counts.cpu()
            dist.all_reduce(counts, group=group)
            self.counts = counts

    def compute(self) -> Scores:
        """Scores of everything counted so far."""
        counts = self.counts.cpu().double()
        right, truth = counts.diagonal(), counts.sum(1)
        iou = right / (truth + counts.sum(0) - right)  # 0 / 0 is NaN: a class that occurs nowhere
        return Scores(
            miou=float(iou.nanmean()),
            accuracy=float(right.sum() / counts.sum()),
            mean_accuracy=float((right / truth).nanmean()),
            dice=float((2 * iou / (1 + iou)).nanmean()),
            iou=dict(zip(self.class_names, iou.tolist(), strict=True)),
        )
