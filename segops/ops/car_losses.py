"""The losses of class-aware regularisation: the public function, then the op behind its pass over the features."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _context, _dispatch
from .._dispatch import Compiled, Op
from ..reference._losses import check_labels as check_target
from ..reference._losses import counted, readable
from ..reference.car_losses import car_losses as reference
from ..reference.car_losses import class_to_class
from . import class_centers
from ._gradients import differentiate_through_reference, pull_back
from ._head import contiguous
from ._losses import accumulator, raise_label, why_not
from ._sync import sum_over_ranks, total_over_ranks

__all__ = ["CARLosses", "car_losses"]

NAME = "car_losses"
LEAST_INTRA = 1e-5
NO_CUDA = "no CUDA C++: matrix products want tensor cores, which are Triton's"


class CARLosses(NamedTuple):
    """What :func:`car_losses` returns: three losses []."""

    intra: Tensor
    c2c: Tensor
    c2p: Tensor


def car_losses(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    centers: Tensor | None = None,
    ignore_index: int = 255,
    c2c_threshold: float = 0.5,
    c2p_threshold: float = 0.25,
    per_image: bool = False,
    mask_ignored_c2p: bool = False,
    sync: Any = False,
    check_labels: bool | None = None,
) -> CARLosses:
    """Class-aware regularisation (CAR): features gather at their class's centre, centres and foreign pixels part.

    Each loss is the square of a mean, and centres are constants but where said otherwise::

        intra = max(1e-5, m ** 2),  m = mean over N, h, w, C of |mu_y - x|, which is 0 where ignored
        c2c   = m ** 2,  m = mean over classes i of clip(sum over j != i of relu(A_ij - c2c_threshold / (K - 1)))
                A = softmax_j(mu_i . mu_j / sqrt(C)); the gradient flows into mu_i, and on to the features
        c2p   = m ** 2,  m = mean over N, h, w of clip(sum over k != y of relu(B_k - c2p_threshold / (K - 1)))
                B = softmax_k(x . mu_k / sqrt(C)), with |mu_y|^2 / sqrt(C) at the pixel's own class y

    where clip is to [1e-7, 1 - 1e-7]. The centre of a class without a pixel is 0, and takes part in every softmax and
    mean. To an ignored pixel all classes are foreign in c2p. A value at a threshold has gradient 0.

    Args:
        features: [N, C, h, w], any strides; float16, bfloat16, float32 or float64.
        labels: [N, H, W], uint8, int16, int32 or int64, any strides; H >= h and W >= w. Larger ones are read at the
            nearest pixel with aligned corners: row i at ``floor(i (H - 1) / (h - 1) + 1/2)``.
        num_classes: K >= 2.
        centers: [K, C], or [N, K, C] with ``per_image``, in any floating dtype: takes the place of the centres of
            these features, which then get no gradient from c2c; the given centres do.
        ignore_index: Label of pixels without a class; any int. With more than 255 classes 255 is one of them: pass -1.
        c2c_threshold: What foreign classes may share of a centre's softmax, in all, before it costs.
        c2p_threshold: The same of a pixel's softmax.
        per_image: Centres of each image instead of the batch; c2c is then a mean over images too.
        mask_ignored_c2p: Leave ignored pixels out of c2p, its mean included.
        sync: Sum over the ranks what becomes centres and means: True, or a process group of torch.distributed. Every
            rank then has the losses of all images. Backward sums the ranks' gradients, so that after
            DistributedDataParallel's mean the gradients of parameters are those of one process with all images.
        check_labels: Whether a label that is neither in [0, K) nor ignore_index, or a given centre that is not finite,
            is an error; else such a label is ignored. None means yes on the CPU, no on a GPU, where the check waits
            for the device. The error's position is in the labels as read at [N, h, w].

    Returns:
        ``intra``, ``c2c`` and ``c2p``, each [], float32 (float64 for float64), not weighted. All are 0, without a
        gradient, where no pixel has a class.

    Raises:
        ValueError: shapes that do not fit, K = 1, a threshold out of [0, K], a label out of range, or a centre that is
            not finite.
        TypeError: dtypes that do not fit.

    The gradient reaches features, twice. Everything runs in float32 (float64 for float64), under autocast too, without
    atomics: the same, bit for bit, on every run. Features are read twice forward, for the centres and for the losses,
    and once backward; a GPU program reads its own pixels' again in backward, from its cache as far as that holds them,
    and beyond 256 classes more often. Neither a one-hot map nor one of N x K is stored. Backends: C++ (CPU), Triton
    (GPU); ``segops.explain`` says which.

    Example:
        >>> features = torch.randn(2, 64, 16, 16)
        >>> labels = torch.randint(0, 19, (2, 128, 128), dtype=torch.uint8)
        >>> intra, c2c, c2p = segops.car_losses(features, labels, 19)
        >>> c2p.shape
        torch.Size([])
    """
    labels, group, check = class_centers.check_arguments(
        NAME, features, labels, num_classes, ignore_index, per_image, sync, check_labels
    )
    for argument, threshold in (("c2c_threshold", c2c_threshold), ("c2p_threshold", c2p_threshold)):
        _checks.number(NAME, argument, threshold, 0.0, num_classes)
    if not isinstance(mask_ignored_c2p, bool):
        raise TypeError(f"{NAME}: mask_ignored_c2p must be a bool, got {mask_ignored_c2p!r}")
    n, c, h, w = features.shape
    sums, shape = None, (n, num_classes, c) if per_image else (num_classes, c)
    if centers is not None:
        _check_centers(centers, features, shape, check)
        centers = centers.to(accumulator(features.dtype))
        fixed = centers.detach()
    elif _dispatch.explaining():
        fixed = features.new_empty(shape)
    else:
        with torch.no_grad():
            sums, counts = class_centers.OP(features, labels, num_classes, ignore_index, per_image, False)
            total = sums if per_image else total_over_ranks(sums, group)
            divisor = (counts if per_image else total_over_ranks(counts, group)).clamp(min=1).unsqueeze(-1)
            fixed = total / divisor
    settings = ignore_index, float(c2p_threshold), mask_ignored_c2p
    intra, c2p, passed, _, _ = OP(features, labels, fixed, sums, *settings, check)
    if centers is None:
        centers = (passed if per_image else sum_over_ranks(passed, group, total)) / divisor

    device = features.device.type
    with torch.autocast(device, enabled=False) if _context.autocasts(device) else nullcontext():
        c2c = class_to_class(centers, c2c_threshold).sum()
    known = counted(labels, num_classes, ignore_index).sum().to(intra.dtype)
    rows = torch.full_like(intra, n * num_classes if per_image else num_classes)
    pixels = torch.full_like(intra, n * h * w)
    if group is not None:
        means = [intra, c2p, known, pixels, *([c2c, rows] if per_image else [])]
        intra, c2p, known, pixels, *of_images = sum_over_ranks(torch.stack(means), group).unbind()
        c2c, rows = of_images if per_image else (c2c, rows)
    seen = known if mask_ignored_c2p else pixels
    losses = CARLosses(
        (intra / (pixels * c).clamp(min=1)).square().clamp(min=LEAST_INTRA),
        (c2c / rows.clamp(min=1)).square(),
        (c2p / seen.clamp(min=1)).square(),
    )
    return CARLosses(*(torch.where(known > 0, loss, 0) for loss in losses))


def _check_centers(centers: Any, features: Tensor, shape: tuple[int, ...], check: bool) -> None:
    layout = "[N, K, C]" if len(shape) == 3 else "[K, C]"
    _checks.tensor(NAME, "centers", centers, layout)
    _checks.on_device(NAME, "centers", centers, features)
    if centers.shape != shape:
        raise ValueError(f"{NAME}: centers must be {layout} = {list(shape)}, got {list(centers.shape)}")
    if check and readable(centers) and not centers.isfinite().all():
        at = (~centers.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{NAME}: centers must be finite, got {float(centers[tuple(at)])} at {at}")


def _empty(features: Tensor, centers: Tensor, sums: Tensor | None) -> tuple[Tensor, ...]:
    n, _, h, w = features.shape
    scalar, pixels = centers.new_empty(()), centers.new_empty(n, h, w)
    passed = centers.new_empty(0) if sums is None else torch.empty_like(sums)
    return scalar, torch.empty_like(scalar), passed, pixels, torch.empty_like(pixels)


def _fake(features, labels, centers, sums, ignore_index, c2p_threshold, mask_ignored_c2p, check):
    return _empty(features, centers, sums)


def _fake_backward(grad_intra, grad_c2p, grad_sums, features, *rest):
    return torch.empty_like(features)


def _reference_backward(
    grad_intra, grad_c2p, grad_sums, features, labels, centers, lse, inner, ignore_index, c2p_threshold, mask
):
    def losses(features):
        sums = None if grad_sums is None else torch.empty_like(grad_sums)
        return reference(features, labels, centers, sums, ignore_index, c2p_threshold, mask, False)[:3]

    return pull_back(losses, (features,), (grad_intra, grad_c2p, grad_sums))[0]


def _setup_context(ctx, inputs, output):
    features, labels, centers, sums, ctx.ignore_index, ctx.c2p_threshold, ctx.mask, _ = inputs
    _, _, passed, lse, inner = output
    ctx.mark_non_differentiable(lse, inner, *([passed] if sums is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, labels, centers, lse, inner)


def _backward(ctx, grad_intra, grad_c2p, grad_sums, *_):
    if grad_intra is None and grad_c2p is None and grad_sums is None:
        return (None,) * 8
    features, labels, centers, lse, inner = ctx.saved_tensors
    zero = centers.new_zeros(())
    grad_intra, grad_c2p = (zero if grad is None else grad for grad in (grad_intra, grad_c2p))
    settings = ctx.ignore_index, ctx.c2p_threshold, ctx.mask
    grad = BACKWARD(grad_intra, grad_c2p, grad_sums, features, labels, centers, lse, inner, *settings)
    return grad, *(None,) * 7


def _pass_on(sums: Tensor | None, passed: Tensor) -> None:
    if sums is not None:
        passed.copy_(sums)


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(features, labels, centers, sums, *settings_and_check):
        *settings, check = settings_and_check
        intra, c2p, passed, lse, inner = outputs = _empty(features, centers, sums)
        _pass_on(sums, passed)
        wrong = compiled.car_losses(intra, c2p, lse, inner, features, labels, contiguous(centers), *settings)
        if check:
            raise_label(NAME, labels, wrong, centers.shape[-2], settings[0], "labels")
        return outputs

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_intra, grad_c2p, grad_sums, features, labels, centers, lse, inner, ignore_index, c2p_threshold, mask):
        grad_features = torch.empty_like(features)
        compiled.car_losses_backward(
            grad_features, grad_intra, grad_c2p, contiguous(grad_sums), features, labels, contiguous(centers), lse,
            inner, ignore_index, c2p_threshold,
        )  # fmt: skip
        return grad_features

    return run


def _triton(features, labels, centers, sums, *settings_and_check):
    *settings, check = settings_and_check
    if check:
        check_target(NAME, "labels", labels, centers.shape[-2], settings[0])
    intra, c2p, passed, lse, inner = outputs = _empty(features, centers, sums)
    _pass_on(sums, passed)
    _dispatch.kernels(NAME).forward(intra, c2p, lse, inner, features, labels, contiguous(centers), *settings)
    return outputs


def _triton_backward(
    grad_intra, grad_c2p, grad_sums, features, labels, centers, lse, inner, ignore_index, c2p_threshold, mask
):
    grad_features = torch.empty_like(features)
    _dispatch.kernels(NAME).backward(
        grad_features, grad_intra, grad_c2p, contiguous(grad_sums), features, labels, contiguous(centers), lse, inner,
        ignore_index, c2p_threshold,
    )  # fmt: skip
    return grad_features


def _why_not_backward(grad_intra: Tensor, grad_c2p: Tensor, grad_sums: Any, features: Tensor, *args: Any) -> str | None:
    return why_not(features)


def _flops(features, labels, centers, *rest):
    n, c, h, w = features
    return 2 * n * h * w * c * centers[-2]


def _backward_flops(grad_intra, grad_c2p, grad_sums, features, labels, centers, *rest):
    return 2 * _flops(features, labels, centers)


OP = Op(
    NAME,
    "(Tensor features, Tensor labels, Tensor centers, Tensor? sums, int ignore_index, float c2p_threshold, "
    "bool mask_ignored_c2p, bool check) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(native=Compiled(NAME, _native), triton=_triton, cuda=NO_CUDA, why_not=why_not),
    flops=_flops,
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    f"{NAME}_backward",
    "(Tensor grad_intra, Tensor grad_c2p, Tensor? grad_sums, Tensor features, Tensor labels, Tensor centers, "
    "Tensor lse, Tensor inner, int ignore_index, float c2p_threshold, bool mask_ignored_c2p) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled(f"{NAME}_backward", _native_backward),
        triton=_triton_backward,
        cuda=NO_CUDA,
        why_not=_why_not_backward,
    ),
    flops=_backward_flops,
)
differentiate_through_reference(BACKWARD, ("grad_intra", "grad_c2p", "grad_sums", "features"), saved=("lse", "inner"))
