"""Counts of target and predicted classes: the public function, then the op behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._dispatch import Compiled, Op
from ..reference._losses import label_error
from ..reference.confusion_matrix import check_pairs
from ..reference.confusion_matrix import confusion_matrix as reference

__all__ = ["confusion_matrix"]

NAME = "confusion_matrix"


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, *, ignore_index: int = 255) -> Tensor:
    """How often each class was predicted for each target class.

    Args:
        prediction: Labels of any shape, uint8, int16, int32 or int64, any strides; each in [0, K) where it is counted.
        target: Labels of prediction's shape, each in [0, K) or ignore_index; its dtype may differ.
        num_classes: K.
        ignore_index: Target label whose pixels are not counted; any int.

    Returns:
        int64 [K, K], rows are targets, columns predictions.

    Raises:
        ValueError: shapes or devices that differ; on the CPU also a label out of range, named with its position. On a
            GPU such a pixel is not counted: the check would wait for the device.
        TypeError: dtypes that are not one of the four.

    There is no gradient. Counts are exact. Backends: C++ (CPU), Triton (GPU); ``segops.explain`` says which.
    :class:`segops.metrics.ConfusionMatrix` adds up images and computes scores.

    Example:
        >>> segops.confusion_matrix(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 255]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    _checks.labels(NAME, "prediction", prediction)
    _checks.labels(NAME, "target", target)
    _checks.on_device(NAME, "target", target, prediction)
    _checks.positive(NAME, "num_classes", num_classes)
    _checks.integer(NAME, "ignore_index", ignore_index)
    if prediction.shape != target.shape:
        raise ValueError(
            f"{NAME}: prediction must have target's shape {tuple(target.shape)}, got {tuple(prediction.shape)}"
        )
    return OP(prediction, target, num_classes, ignore_index, target.device.type == "cpu")


def _fake(prediction, target, num_classes, ignore_index, check):
    return torch.empty((num_classes, num_classes), dtype=torch.int64, device=target.device)


def _as_maps(labels: Tensor) -> Tensor:
    """[N, H, W], which the kernels take."""
    if labels.dim() > 3:
        return labels.flatten(0, -3)
    return labels[(None,) * (3 - labels.dim())]


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(prediction, target, num_classes, ignore_index, check):
        counts = _fake(prediction, target, num_classes, ignore_index, check)
        wrong = compiled.confusion_matrix(counts, _as_maps(prediction), _as_maps(target), ignore_index)
        if check and wrong >= target.numel():
            raise label_error(NAME, "prediction", prediction, wrong - target.numel(), num_classes, None)
        if check and wrong >= 0:
            raise label_error(NAME, "target", target, wrong, num_classes, ignore_index)
        return counts

    return run


def _triton(prediction, target, num_classes, ignore_index, check):
    if check:
        check_pairs(prediction, target, num_classes, ignore_index)
    counts = _fake(prediction, target, num_classes, ignore_index, check)
    _dispatch.kernels(NAME).forward(counts, _as_maps(prediction), _as_maps(target), ignore_index)
    return counts


OP = Op(
    NAME,
    "(Tensor prediction, Tensor target, int num_classes, int ignore_index, bool check) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(
        native=Compiled(NAME, _native),
        triton=_triton,
        cuda="no CUDA C++: counting is bound by the bytes of the labels",
        why_not=lambda *args: None,
    ),
)
OP.register_no_gradient()
