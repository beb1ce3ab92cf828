"""What the losses and label maps share: cross-entropy of given logits, their argmax, and the label check."""

from __future__ import annotations

import torch
from torch import Tensor

from .._context import levels

__all__ = ["check_labels", "counted", "cross_entropy", "label_error", "readable", "winner"]


def counted(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Where a label is neither ignored nor out of range; bool, the labels' shape."""
    labels = labels.long()  # or -100 would equal 156 in uint8
    return (labels != ignore_index) & (labels >= 0) & (labels < classes)


def readable(x: Tensor) -> bool:
    """Whether values can be looked at: not while compiling, in the stand-in of a tracer, under vmap, or of meta."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    return not any(torch._C._functorch.is_batchedtensor(level) for level in levels(x))


def check_labels(function: str, name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raises the ValueError of the first label out of range."""
    if readable(labels):
        wrong = ~counted(labels, classes, ignore_index) & (labels.long() != ignore_index)
        if wrong.any():
            raise label_error(function, name, labels, int(wrong.flatten().int().argmax()), classes, ignore_index)


def label_error(
    function: str, name: str, labels: Tensor, index: int, classes: int, ignore_index: int | None
) -> ValueError:
    """The error that names the label at a flat index, and where it stands."""
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), labels.shape))
    ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
    return ValueError(
        f"{function}: {name} must be in [0, {classes}){ignored}, got {int(labels[position])} at {list(position)}"
    )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    per_pixel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [N, H, W] or its sum, count [], lse [N, H, W] of logits [N, K, H, W].

    loss = (1 - e) w_y (lse - z_y) + e / K sum_c w_c (lse - z_c), 0 where the label is not counted
    count = sum of w_y
    """
    classes = logits.shape[1]
    valid = counted(target, classes, ignore_index)
    label = target.long().where(valid, 0)
    weight = logits.new_ones(classes) if class_weight is None else class_weight
    lse = logits.logsumexp(1)
    surprise = lse.unsqueeze(1) - logits
    loss = (1 - label_smoothing) * weight[label] * surprise.gather(1, label.unsqueeze(1)).squeeze(1)
    if label_smoothing:
        loss = loss + label_smoothing / classes * torch.einsum("nkhw,k->nhw", surprise, weight)
    loss = loss.where(valid, 0)
    count = valid.sum().to(lse.dtype) if class_weight is None else weight[label].where(valid, 0).sum()
    return loss if per_pixel else loss.sum(), count, lse.detach()


def winner(scores: Tensor, confidence: Tensor | None) -> tuple[Tensor, Tensor]:
    """labels [N, H, W] of scores [N, K, H, W], the lowest class of a tie; confidence as given, or empty."""
    labels = scores.argmax(1)
    if scores.shape[1] <= 255:
        labels = labels.to(torch.uint8)
    return labels, scores.new_empty(0) if confidence is None else confidence.detach()
