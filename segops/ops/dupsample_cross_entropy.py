"""Cross-entropy of data-dependent upsampling: the public function, then the op behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Compiled, Op
from ..reference._losses import check_labels as check_target
from ..reference.dupsample import check_temperature
from ..reference.dupsample_cross_entropy import dupsample_cross_entropy as reference
from ._gradients import differentiate_through_reference, pull_back
from ._head import backward_flops, check_classes, check_head, check_size, contiguous, empty_gradients, flops
from ._losses import check_settings, empty, raise_label, reduced, why_not

__all__ = ["dupsample_cross_entropy"]

NAME = "dupsample_cross_entropy"
NO_CUDA = "no CUDA C++: its matrix products want tensor cores, which are Triton's"


def dupsample_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale_factor: int,
    temperature: Tensor | float | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    denominator: str = "valid",
    check_labels: bool | None = None,
) -> Tensor:
    """Cross-entropy of :func:`segops.dupsample`'s logits, fused: they are stored neither forward nor backward.

    Equal to ``torch.nn.functional.cross_entropy(segops.dupsample(x, weight, bias, ...), target, ...)`` (DUpsampling,
    section 3.1 and eq. 5; the temperature is that of section 3.3), which is ``-log softmax(z / T)[target]`` averaged.

    Args:
        x: [N, C, h, w], any strides; float16, bfloat16, float32 or float64.
        weight: [r * r * K, C] or [r * r * K, C, 1, 1], x's dtype; row ``(dy r + dx) K + k`` is class k of pixel
            (dy, dx) of the window. K >= 2.
        target: [N, H, W], uint8, int16, int32 or int64, any strides; r (h - 1) < H <= r h and the same for W: what the
            windows have beyond it at the bottom and on the right is cropped.
        bias: [r * r * K], x's dtype.
        scale_factor: r, pixels per cell and axis.
        temperature: A number, or one element [] or [1] of any floating-point dtype; not 0, may be negative. None
            means 1.
        class_weight: [K], a factor on the loss of each class, with torch's meaning; it has no gradient.
        ignore_index: Label that is not counted; any int. With more than 255 classes 255 is one of them: pass -1.
        label_smoothing: In [0, 1], with torch's meaning.
        reduction: "none" (0 where not counted), "mean" or "sum".
        denominator: Of the mean. "valid": counted pixels, each with its class weight, as torch has it. "all": N H W
            (the default of mmsegmentation).
        check_labels: Whether a label that is neither in [0, K) nor ignore_index is an error; else it is not counted.
            None means yes on the CPU, no on a GPU, where the check waits for the device.

    Returns:
        [] or, for "none", [N, H, W]; float32 (float64 for float64). 0 where no pixel is counted.

    Raises:
        ValueError: as :func:`segops.dupsample`; also K = 1, a target of another size, class weights that are not K, or
            a label out of range, named with its position.
        TypeError: dtypes that differ, or that do not fit.

    Gradients reach x, weight, bias and temperature, twice. The result is the same, bit for bit, on every run; sums run
    in float32 (float64 for float64). Backends: C++ (CPU), Triton (GPU); ``segops.explain`` says which. Under autocast
    x, weight and bias are cast to the autocast dtype, and the rest is not.

    Example:
        >>> x, weight = torch.randn(2, 64, 9, 13), torch.randn(8 * 8 * 21, 64) / 8
        >>> target = torch.randint(0, 21, (2, 72, 101), dtype=torch.uint8)
        >>> segops.dupsample_cross_entropy(x, weight, target, scale_factor=8).shape
        torch.Size([])
    """
    weight, temperature = check_head(NAME, x, weight, bias, scale_factor, temperature)
    classes = check_classes(
        NAME, weight, scale_factor,
        "for one logit per pixel take torch.nn.functional.binary_cross_entropy_with_logits of segops.dupsample",
    )  # fmt: skip
    class_weight = check_settings(
        NAME, x, target, classes, class_weight, ignore_index, label_smoothing, reduction, denominator
    )
    check_size(NAME, "target", x, scale_factor, target.shape[1:])
    check = x.device.type == "cpu" if check_labels is None else check_labels
    loss, count, _ = OP(
        x, weight, target, bias, temperature, class_weight, scale_factor, ignore_index, float(label_smoothing),
        reduction == "none", check,
    )  # fmt: skip
    return reduced(loss, count, target, reduction, denominator)


def _fake(x, weight, target, bias, temperature, class_weight, scale_factor, ignore, smoothing, per_pixel, check):
    return empty(x, target, per_pixel)


def _fake_backward(grad_loss, x, weight, target, bias, temperature, *rest):
    return empty_gradients(x, weight, bias, temperature)


def _reference_backward(
    grad_loss, x, weight, target, bias, temperature, class_weight, lse, scale_factor, ignore_index, label_smoothing
):
    def loss(x, weight, bias, temperature):
        settings = (scale_factor, ignore_index, label_smoothing, grad_loss.dim() == 3, False)
        return reference(x, weight, target, bias, temperature, class_weight, *settings)[:1]

    return pull_back(loss, (x, weight, bias, temperature), (grad_loss,))


def _setup_context(ctx, inputs, output):
    *tensors, scale_factor, ignore_index, label_smoothing, _, _ = inputs
    _, count, lse = output
    ctx.mark_non_differentiable(count, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse)
    ctx.settings = scale_factor, ignore_index, label_smoothing


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 11
    bias, temperature = ctx.saved_tensors[3:5]
    grad_x, grad_weight, grad_bias, grad_temperature = BACKWARD(grad_loss, *ctx.saved_tensors, *ctx.settings)
    return (
        grad_x, grad_weight, None, None if bias is None else grad_bias,
        None if temperature is None else grad_temperature, *(None,) * 6,
    )  # fmt: skip


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(x, weight, target, bias, temperature, class_weight, scale_factor, ignore, smoothing, per_pixel, check):
        check_temperature(NAME, temperature)
        outputs = empty(x, target, per_pixel)
        wrong = compiled.dupsample_cross_entropy(
            *outputs, x, weight, target, contiguous(bias), temperature, contiguous(class_weight), scale_factor, ignore,
            smoothing,
        )  # fmt: skip
        if check:
            raise_label(NAME, target, wrong, weight.shape[0] // scale_factor**2, ignore)
        return outputs

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_loss, x, weight, target, bias, temperature, class_weight, lse, *settings):
        gradients = empty_gradients(x, weight, bias, temperature)
        compiled.dupsample_cross_entropy_backward(
            *gradients, grad_loss, x, weight, target, contiguous(bias), temperature, contiguous(class_weight), lse,
            *settings,
        )  # fmt: skip
        return gradients

    return run


def _triton(x, weight, target, bias, temperature, class_weight, scale_factor, ignore, smoothing, per_pixel, check):
    check_temperature(NAME, temperature)
    if check:
        check_target(NAME, "target", target, weight.shape[0] // scale_factor**2, ignore)
    outputs = empty(x, target, per_pixel)
    _dispatch.kernels(NAME).forward(
        *outputs, x, weight, target, contiguous(bias), temperature, contiguous(class_weight), scale_factor, ignore,
        smoothing,
    )  # fmt: skip
    return outputs


def _triton_backward(grad_loss, x, weight, target, bias, temperature, class_weight, lse, *settings):
    gradients = empty_gradients(x, weight, bias, temperature)
    _dispatch.kernels(NAME).backward(
        *gradients, grad_loss, x, weight, target, contiguous(bias), temperature, contiguous(class_weight), lse,
        *settings,
    )  # fmt: skip
    return gradients


def _why_not_backward(grad_loss: Tensor, x: Tensor, *args: Any) -> str | None:
    return why_not(x)


OP = Op(
    NAME,
    "(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? temperature, Tensor? class_weight, "
    "int scale_factor, int ignore_index, float label_smoothing, bool per_pixel, bool check) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(native=Compiled(NAME, _native), triton=_triton, cuda=NO_CUDA, why_not=why_not),
    autocast=("x", "weight", "bias"),
    flops=flops,
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    f"{NAME}_backward",
    "(Tensor grad_loss, Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? temperature, "
    "Tensor? class_weight, Tensor lse, int scale_factor, int ignore_index, float label_smoothing) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled(f"{NAME}_backward", _native_backward),
        triton=_triton_backward,
        cuda=NO_CUDA,
        why_not=_why_not_backward,
    ),
    flops=backward_flops,
)
differentiate_through_reference(BACKWARD, ("grad_loss", "x", "weight", "bias", "temperature"), saved=("lse",))
