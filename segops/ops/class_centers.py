"""Class centres of a feature map: the public function, then the op behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._dispatch import Compiled, Op
from ..reference._losses import check_labels as check_target
from ..reference.class_centers import class_centers as reference
from ..reference.class_centers import nearest
from ._gradients import differentiate_through_reference, pull_back
from ._losses import accumulator, raise_label, why_not
from ._sync import check_sync, sum_over_ranks, total_over_ranks

__all__ = ["ClassCenters", "check_arguments", "class_centers"]

NAME = "class_centers"


class ClassCenters(NamedTuple):
    """What :func:`class_centers` returns: centers [K, C] or [N, K, C], counts [K] or [N, K]."""

    centers: Tensor
    counts: Tensor


def class_centers(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    per_image: bool = False,
    sync: Any = False,
    check_labels: bool | None = None,
) -> ClassCenters:
    """The mean feature of each class over the pixels that carry its label: the class centres of CAR.

    Args:
        features: [N, C, h, w], any strides; float16, bfloat16, float32 or float64.
        labels: [N, H, W], uint8, int16, int32 or int64, any strides; H >= h and W >= w. Larger ones are read at the
            nearest pixel with aligned corners: row i at ``floor(i (H - 1) / (h - 1) + 1/2)``.
        num_classes: K >= 2.
        ignore_index: Label that is not counted; any int. With more than 255 classes 255 is one of them: pass -1.
        per_image: Centres of each image instead of the batch.
        sync: Sum over the ranks before the division: True, or a process group of torch.distributed. Backward then
            sums the ranks' gradients, so that after DistributedDataParallel's mean the gradients of parameters are
            those of one process with all images. Has no effect on centres per image.
        check_labels: Whether a label that is neither in [0, K) nor ignore_index is an error; else it is not counted.
            None means yes on the CPU, no on a GPU, where the check waits for the device. The error's position is in
            the labels as read at [N, h, w].

    Returns:
        ``centers``, [K, C] or [N, K, C], float32 (float64 for float64), 0 for a class without a pixel; and ``counts``,
        int64 [K] or [N, K].

    Raises:
        ValueError: shapes that do not fit, K = 1, or a label out of range, named with its position.
        TypeError: dtypes that do not fit.

    The gradient reaches features, twice. Sums run in float32 (float64 for float64), under autocast too, without
    atomics: the same, bit for bit, on every run. Nothing of the features' size is stored. Backends: C++ (CPU), Triton
    and CUDA C++ (GPU); ``segops.explain`` says which.

    Example:
        >>> features = torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 1, 3)
        >>> segops.class_centers(features, torch.tensor([[[0, 0, 1]]]), 2)
        ClassCenters(centers=tensor([[2.],
                [5.]]), counts=tensor([2, 1]))
    """
    labels, group, check = check_arguments(
        NAME, features, labels, num_classes, ignore_index, per_image, sync, check_labels
    )
    sums, counts = OP(features, labels, num_classes, ignore_index, per_image, check)
    if not per_image:
        sums, counts = sum_over_ranks(sums, group), total_over_ranks(counts, group)
    return ClassCenters(sums / counts.clamp(min=1).unsqueeze(-1), counts)


def check_arguments(
    function: str,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    per_image: bool,
    sync: Any,
    check_labels: bool | None,
) -> tuple[Tensor, Any, bool]:
    """Returns labels [N, h, w], the process group or None, and whether labels are checked."""
    _checks.tensor(function, "features", features, "[N, C, h, w]")
    n, c, h, w = features.shape
    if c < 1 or h < 1 or w < 1:
        raise ValueError(f"{function}: features must have C, h, w >= 1, got {tuple(features.shape)}")
    _checks.labels(function, "labels", labels, "[N, H, W]")
    _checks.on_device(function, "labels", labels, features)
    if labels.shape[0] != n or labels.shape[1] < h or labels.shape[2] < w:
        raise ValueError(
            f"{function}: labels must be [{n}, H, W] with H >= {h} and W >= {w}, the features' size, "
            f"got {tuple(labels.shape)}"
        )
    _checks.integer(function, "num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(f"{function}: num_classes must be at least 2, got {num_classes}: one class has no other")
    _checks.integer(function, "ignore_index", ignore_index)
    if not isinstance(per_image, bool):
        raise TypeError(f"{function}: per_image must be a bool, got {per_image!r}")
    if labels.shape[1] != h or labels.shape[2] != w:
        labels = nearest(labels, h, w)
    check = features.device.type == "cpu" if check_labels is None else check_labels
    return labels, check_sync(function, sync), check


def _empty(features: Tensor, num_classes: int, per_image: bool) -> tuple[Tensor, Tensor]:
    n, c = features.shape[:2]
    shape = (n, num_classes) if per_image else (num_classes,)
    sums = torch.empty((*shape, c), dtype=accumulator(features.dtype), device=features.device)
    return sums, torch.empty(shape, dtype=torch.int64, device=features.device)


def _fake(features, labels, num_classes, ignore_index, per_image, check):
    return _empty(features, num_classes, per_image)


def _fake_backward(grad_sums, features, labels, ignore_index):
    return torch.empty_like(features)


def _reference_backward(grad_sums, features, labels, ignore_index):
    def sums(features):
        return reference(features, labels, grad_sums.shape[-2], ignore_index, grad_sums.dim() == 3, False)[:1]

    return pull_back(sums, (features,), (grad_sums,))[0]


def _setup_context(ctx, inputs, output):
    features, labels, _, ctx.ignore_index, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, labels)


def _backward(ctx, grad_sums, _):
    if grad_sums is None:
        return (None,) * 6
    return BACKWARD(grad_sums, *ctx.saved_tensors, ctx.ignore_index), *(None,) * 5


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(features, labels, num_classes, ignore_index, per_image, check):
        outputs = _empty(features, num_classes, per_image)
        wrong = compiled.class_centers(*outputs, features, labels, ignore_index)
        if check:
            raise_label(NAME, labels, wrong, num_classes, ignore_index, "labels")
        return outputs

    return run


def _cuda(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(features, labels, num_classes, ignore_index, per_image, check):
        if check:
            check_target(NAME, "labels", labels, num_classes, ignore_index)
        outputs = _empty(features, num_classes, per_image)
        compiled.class_centers(*outputs, features, labels, ignore_index)
        return outputs

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_sums, features, labels, ignore_index):
        grad_features = torch.empty_like(features)
        compiled.class_centers_backward(grad_features, grad_sums.contiguous(), labels, ignore_index)
        return grad_features

    return run


def _triton(features, labels, num_classes, ignore_index, per_image, check):
    if check:
        check_target(NAME, "labels", labels, num_classes, ignore_index)
    outputs = _empty(features, num_classes, per_image)
    _dispatch.kernels(NAME).forward(*outputs, features, labels, ignore_index)
    return outputs


def _triton_backward(grad_sums, features, labels, ignore_index):
    grad_features = torch.empty_like(features)
    _dispatch.kernels(NAME).backward(grad_features, grad_sums.contiguous(), labels, ignore_index)
    return grad_features


def _why_not_backward(grad_sums: Tensor, features: Tensor, *args: Any) -> str | None:
    return why_not(features)


OP = Op(
    NAME,
    "(Tensor features, Tensor labels, int num_classes, int ignore_index, bool per_image, bool check) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(
        native=Compiled(NAME, _native), triton=_triton, cuda=Compiled(NAME, _cuda), why_not=why_not
    ),
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    f"{NAME}_backward",
    "(Tensor grad_sums, Tensor features, Tensor labels, int ignore_index) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled(f"{NAME}_backward", _native_backward), triton=_triton_backward, why_not=_why_not_backward
    ),
)
differentiate_through_reference(BACKWARD, ("grad_sums", "features"))
