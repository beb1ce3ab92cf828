"""Cross-entropy of bilinearly upsampled logits: the public function, then the op behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._dispatch import Compiled, Op
from ..reference._losses import check_labels as check_target
from ..reference._losses import counted
from ..reference.upsample_cross_entropy import upsample_cross_entropy as reference
from ._gradients import differentiate_through_reference, pull_back
from ._head import contiguous
from ._losses import check_settings, empty, raise_label, reduced, why_not

__all__ = ["upsample_cross_entropy"]

NAME = "upsample_cross_entropy"
NO_CUDA = "no CUDA C++: no halo and no gather, nothing that Triton does badly"


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    align_corners: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    denominator: str = "valid",
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100_000,
    check_labels: bool | None = None,
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits, fused: full-size logits are stored neither forward nor backward.

    Equal to ``torch.nn.functional.cross_entropy(torch.nn.functional.interpolate(logits, target.shape[1:],
    mode="bilinear", align_corners=align_corners), target, ...)``. With ``ohem_threshold`` only hard pixels are kept
    (online hard example mining, as GALD trains with).

    Args:
        logits: [N, K, h, w], any strides, K >= 2; float16, bfloat16, float32 or float64.
        target: [N, H, W], uint8, int16, int32 or int64, any strides; H and W may be larger or smaller than h and w.
        align_corners: Corner convention of the interpolation; False is half-pixel, with clamped borders.
        class_weight: [K], a factor on the loss of each class, with torch's meaning; it has no gradient.
        ignore_index: Label that is not counted; any int. With more than 255 classes 255 is one of them: pass -1.
        label_smoothing: In [0, 1], with torch's meaning.
        reduction: "none" (0 where not counted or not kept), "mean" or "sum".
        denominator: Of the mean. "valid": counted (and kept) pixels, each with its class weight, as torch has it.
            "all": N H W (the default of mmsegmentation).
        ohem_threshold: Keep counted pixels whose probability of the right class is at most t, the larger of this and
            the ohem_min_kept-th smallest probability of the call; ties with t are kept. None keeps all.
        ohem_min_kept: In pixels of the call. All are kept if there are fewer, or if it is 0.
        check_labels: Whether a label that is neither in [0, K) nor ignore_index is an error; else it is not counted.
            None means yes on the CPU, no on a GPU, where the check waits for the device.

    Returns:
        [] or, for "none", [N, H, W]; float32 (float64 for float64). 0 where no pixel is counted.

    Raises:
        ValueError: shapes that do not fit, K = 1, class weights that are not K, a setting out of range, or a label out
            of range, named with its position.
        TypeError: dtypes that do not fit.

    The gradient reaches logits, twice; none goes through the choice of hard pixels. The result is the same, bit for
    bit, on every run; everything runs in float32 (float64 for float64), under autocast too. Backward
    takes probabilities from the saved log-sum-exp, whose rounding, 6e-8 of its size, is their relative error: logits in
    the thousands cost accuracy. Backends: C++ (CPU),
    Triton (GPU); ``segops.explain`` says which.

    Example:
        >>> logits = torch.randn(2, 19, 16, 32)
        >>> target = torch.randint(0, 19, (2, 128, 256), dtype=torch.uint8)
        >>> segops.upsample_cross_entropy(logits, target).shape
        torch.Size([])
    """
    _checks.tensor(NAME, "logits", logits, "[N, K, h, w]")
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(
            f"{NAME}: logits must have 2 classes or more, got {classes}: for one logit per pixel take "
            "torch.nn.functional.binary_cross_entropy_with_logits of the upsampled logits"
        )
    class_weight = check_settings(
        NAME, logits, target, classes, class_weight, ignore_index, label_smoothing, reduction, denominator
    )
    for argument, tensor in (("logits", logits), ("target", target)):
        if tensor.shape[-2] < 1 or tensor.shape[-1] < 1:
            raise ValueError(f"{NAME}: {argument} must have height and width >= 1, got {tuple(tensor.shape)}")
    check = logits.device.type == "cpu" if check_labels is None else check_labels
    if ohem_threshold is not None:
        _checks.number(NAME, "ohem_threshold", ohem_threshold, 0.0, 1.0)
        _checks.integer(NAME, "ohem_min_kept", ohem_min_kept)
        if ohem_min_kept < 0:
            raise ValueError(f"{NAME}: ohem_min_kept must be at least 0, got {ohem_min_kept}")
    settings = align_corners, ignore_index
    hard = ohem_threshold is not None and ohem_min_kept > 0
    loss, count, _ = OP(
        logits, target, class_weight, *settings, float(label_smoothing), hard or reduction == "none", check
    )
    if ohem_threshold is not None and ohem_min_kept > 0:
        surprise = loss.detach()
        if class_weight is not None or label_smoothing:
            surprise, _, _ = OP(logits.detach(), target, None, *settings, 0.0, True, False)
        kept = _hard_pixels(surprise, target, classes, ignore_index, ohem_threshold, ohem_min_kept)
        loss = loss.where(kept, 0)
        if reduction == "none":
            return loss
        weight = loss.new_ones(classes) if class_weight is None else class_weight
        count = weight[target.long().where(kept, 0)].where(kept, 0).sum()
        loss = loss.sum()
    return reduced(loss, count, target, reduction, denominator)


def _hard_pixels(
    surprise: Tensor, target: Tensor, classes: int, ignore_index: int, threshold: float, min_kept: int
) -> Tensor:
    """Which pixels are kept, from -log of the probability of the right class; 0 where not counted."""
    valid = counted(target, classes, ignore_index)
    if target.numel() == 0:
        return valid
    probability = torch.exp(-surprise)
    least = probability.flatten().kthvalue(min(target.numel(), min_kept)).values.clamp_min(threshold)
    return valid & ((probability <= least) | (valid.sum() < min_kept))


def _fake(logits, target, class_weight, align_corners, ignore_index, label_smoothing, per_pixel, check):
    return empty(logits, target, per_pixel)


def _fake_backward(grad_loss, logits, *rest):
    return torch.empty_like(logits)


def _reference_backward(grad_loss, logits, target, class_weight, lse, align_corners, ignore_index, label_smoothing):
    def loss(logits):
        settings = (align_corners, ignore_index, label_smoothing, grad_loss.dim() == 3, False)
        return reference(logits, target, class_weight, *settings)[:1]

    return pull_back(loss, (logits,), (grad_loss,))[0]


def _setup_context(ctx, inputs, output):
    logits, target, class_weight, align_corners, ignore_index, label_smoothing, _, _ = inputs
    _, count, lse = output
    ctx.mark_non_differentiable(count, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, class_weight, lse)
    ctx.settings = align_corners, ignore_index, label_smoothing


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 8
    return BACKWARD(grad_loss, *ctx.saved_tensors, *ctx.settings), *(None,) * 7


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(logits, target, class_weight, align_corners, ignore_index, label_smoothing, per_pixel, check):
        outputs = empty(logits, target, per_pixel)
        wrong = compiled.upsample_cross_entropy(
            *outputs, logits, target, contiguous(class_weight), align_corners, ignore_index, label_smoothing
        )
        if check:
            raise_label(NAME, target, wrong, logits.shape[1], ignore_index)
        return outputs

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_loss, logits, target, class_weight, lse, *settings):
        grad_logits = torch.empty_like(logits)
        compiled.upsample_cross_entropy_backward(
            grad_logits, grad_loss, logits, target, contiguous(class_weight), lse, *settings
        )
        return grad_logits

    return run


def _triton(logits, target, class_weight, align_corners, ignore_index, label_smoothing, per_pixel, check):
    if check:
        check_target(NAME, "target", target, logits.shape[1], ignore_index)
    outputs = empty(logits, target, per_pixel)
    _dispatch.kernels(NAME).forward(
        *outputs, logits, target, contiguous(class_weight), align_corners, ignore_index, label_smoothing
    )
    return outputs


def _triton_backward(grad_loss, logits, target, class_weight, lse, *settings):
    grad_logits = torch.empty_like(logits)
    _dispatch.kernels(NAME).backward(grad_logits, grad_loss, logits, target, contiguous(class_weight), lse, *settings)
    return grad_logits


def _why_not_backward(grad_loss: Tensor, logits: Tensor, *args: Any) -> str | None:
    return why_not(logits)


OP = Op(
    NAME,
    "(Tensor logits, Tensor target, Tensor? class_weight, bool align_corners, int ignore_index, "
    "float label_smoothing, bool per_pixel, bool check) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(native=Compiled(NAME, _native), triton=_triton, cuda=NO_CUDA, why_not=why_not),
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    f"{NAME}_backward",
    "(Tensor grad_loss, Tensor logits, Tensor target, Tensor? class_weight, Tensor lse, bool align_corners, "
    "int ignore_index, float label_smoothing) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled(f"{NAME}_backward", _native_backward),
        triton=_triton_backward,
        cuda=NO_CUDA,
        why_not=_why_not_backward,
    ),
)
differentiate_through_reference(BACKWARD, ("grad_loss", "logits"), saved=("lse",))
