"""Non-negative matrix factorisation of a feature map: the public function, then the op behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _context, _dispatch
from .._dispatch import Compiled, Op
from ..reference.nmf2d import nmf2d as reference
from ._gradients import differentiate_through_reference, pull_back
from ._losses import accumulator, why_not
from ._strips import empty_like_input

__all__ = ["nmf2d"]

NAME = "nmf2d"
GRADS = ("unrolled", "one_step")
NO_CUDA = "no CUDA C++: matrix products want tensor cores, which are Triton's"


def nmf2d(
    x: Tensor,
    bases: Tensor | None = None,
    *,
    rank: int = 64,
    steps: int = 6,
    grad: str = "unrolled",
    eps: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Low-rank rebuilding of a non-negative map by multiplicative updates: Hamburger's NMF (SegNeXt, section 3.2).

    Per image, X [C, H W] ~ B C^T: coefficients start as the softmax over bases of ``X^T B``, then ``steps`` times
    ``C *= (X^T B) / (C B^T B + eps)`` and ``B *= (X C) / (B C^T C + eps)``, and C once more.

    Args:
        x: [N, C, H, W] >= 0 (usually after a ReLU; the sign is not checked), any strides, any H, W >= 1; float16,
            bfloat16, float32 or float64.
        bases: [C, R] or [N, C, R] >= 0, whose columns have length 1, in any floating dtype. None draws them from
            U[0, 1) and normalises them, anew at every call: outputs then differ from call to call.
        rank: R of the drawn bases; not read where bases are given.
        steps: Updates of both factors: 6 in training and 7 in evaluation in SegNeXt.
        grad: ``"unrolled"``: through all updates (SegNeXt). ``"one_step"``: through the last update of the coefficients
            alone, with B as a constant (HamNet); faster, and bases get no gradient.
        eps: Added to the denominators.
        generator: Draws the bases.

    Returns:
        [N, C, H, W] in x's dtype, channels_last if x is.

    Raises:
        ValueError: shapes that do not fit, steps below 0, an unknown grad, bases together with a generator.
        TypeError: dtypes that are not floating-point.

    Everything runs in float32 (float64 for float64), under autocast too. Gradients reach x and, unrolled, bases, twice.
    Backward keeps x and every update of both factors, about (steps + 2) (H W + C) R numbers per image. The same bases
    give the same result, bit for bit, on every run. Backends: C++ (CPU), Triton (GPU);
    ``segops.explain`` says which.

    Example:
        >>> x = torch.rand(2, 64, 16, 24)
        >>> bases = torch.nn.functional.normalize(torch.rand(64, 8), dim=0)
        >>> segops.nmf2d(x, bases, steps=6).shape
        torch.Size([2, 64, 16, 24])
    """
    _checks.tensor(NAME, "x", x, "[N, C, H, W]")
    n, c, h, w = x.shape
    if c < 1 or h < 1 or w < 1:
        raise ValueError(f"{NAME}: x must have C, H, W >= 1, got {tuple(x.shape)}")
    _checks.integer(NAME, "steps", steps)
    if steps < 0:
        raise ValueError(f"{NAME}: steps must be at least 0, got {steps}")
    _checks.choice(NAME, "grad", grad, GRADS)
    _checks.number(NAME, "eps", eps, 0.0, 1.0)
    dtype = accumulator(x.dtype)
    if bases is None:
        _checks.positive(NAME, "rank", rank)
        drawn = torch.rand((n, c, rank), generator=generator, dtype=dtype, device=x.device)
        bases = F.normalize(drawn, dim=1)
    else:
        if generator is not None:
            raise ValueError(f"{NAME}: generator draws bases, and bases are given; pass one of the two")
        if not isinstance(bases, Tensor) or bases.dim() not in (2, 3):
            _checks.tensor(NAME, "bases", bases, f"[{c}, R]")
        _checks.on_device(NAME, "bases", bases, x)
        if not bases.is_floating_point():
            raise TypeError(f"{NAME}: bases must have a floating-point dtype, got {bases.dtype}")
        if bases.shape[-2] != c or bases.shape[-1] < 1 or (bases.dim() == 3 and bases.shape[0] != n):
            raise ValueError(f"{NAME}: bases must be [{c}, R] or [{n}, {c}, R], got {tuple(bases.shape)}")
        bases = bases.to(dtype).expand(n, -1, -1)
    training = _context.wants_gradient(x, bases)
    return OP(x, bases, steps, grad, float(eps), training)[0]


def _empty(x: Tensor, bases: Tensor, steps: int, grad: str, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out, and what backward needs of the iterations; what that holds stands in the reference."""
    if not training:
        return empty_like_input(x), bases.new_empty(0), bases.new_empty(0)
    n, c, h, w = x.shape
    updates = (steps + 2, steps) if grad == "unrolled" else (1, 1)
    coefficients = bases.new_empty(n, updates[0], h * w, bases.shape[2])
    return empty_like_input(x), coefficients, bases.new_empty(n, updates[1], c, bases.shape[2])


def _empty_gradients(x: Tensor, bases: Tensor, for_bases: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), bases.new_empty(bases.shape if for_bases else 0)


def _fake(x, bases, steps, grad, eps, training):
    return _empty(x, bases, steps, grad, training)


def _fake_backward(grad_out, x, bases, coefficients, history, steps, grad, eps, for_bases):
    return _empty_gradients(x, bases, for_bases)


def _reference_backward(grad_out, x, bases, coefficients, history, steps, grad, eps, for_bases):
    def out(x, bases_or_none):
        return reference(x, bases if bases_or_none is None else bases_or_none, steps, grad, eps)[:1]

    return pull_back(out, (x, bases if for_bases else None), (grad_out,))


def _setup_context(ctx, inputs, output):
    x, bases, ctx.steps, ctx.grad, ctx.eps, ctx.training = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, bases, *output[1:])


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 6
    if not ctx.training:
        raise RuntimeError("segops::nmf2d: a gradient is wanted, but training=False kept nothing for it")
    for_bases = ctx.grad == "unrolled" and ctx.needs_input_grad[1]
    grad_x, grad_bases = BACKWARD(grad_out, *ctx.saved_tensors, ctx.steps, ctx.grad, ctx.eps, for_bases)
    return (grad_x, grad_bases if for_bases else None, *(None,) * 4)


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(x, bases, steps, grad, eps, training):
        outputs = _empty(x, bases, steps, grad, training)
        compiled.nmf2d(*outputs, x, bases, steps, grad == "one_step", eps)
        return outputs

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_out, x, bases, coefficients, history, steps, grad, eps, for_bases):
        gradients = _empty_gradients(x, bases, for_bases)
        compiled.nmf2d_backward(*gradients, grad_out, x, bases, coefficients, history, grad == "one_step", eps)
        return gradients

    return run


def _triton(x, bases, steps, grad, eps, training):
    outputs = _empty(x, bases, steps, grad, training)
    with torch.autocast(x.device.type, enabled=False):  # matrix products are torch's
        _dispatch.kernels(NAME).forward(*outputs, x, bases, steps, grad, eps)
    return outputs


def _triton_backward(grad_out, x, bases, coefficients, history, steps, grad, eps, for_bases):
    gradients = _empty_gradients(x, bases, for_bases)
    with torch.autocast(x.device.type, enabled=False):
        _dispatch.kernels(NAME).backward(*gradients, grad_out, x, bases, coefficients, history, grad, eps)
    return gradients


def _products(x: Sequence[int], bases: Sequence[int]) -> tuple[int, int, int]:
    """FLOPs of X^T B, of B^T B and of C (B^T B), and of what costs as much as each."""
    n, c, h, w = x
    r = bases[2]
    return 2 * n * h * w * c * r, 2 * n * c * r * r, 2 * n * h * w * r * r


def _flops(x, bases, steps, grad, eps, training):
    large, small, square = _products(x, bases)
    return (2 * steps + 3) * large + (2 * steps + 1) * (small + square)


def _backward_flops(grad_out, x, bases, coefficients, history, steps, grad, eps, for_bases):
    large, small, square = _products(x, bases)
    if grad == "one_step":
        return 2 * large
    constant = 0 if for_bases else 2 * large + 2 * small + square + (small if steps else large)
    return 2 * _flops(x, bases, steps, grad, eps, True) - constant


OP = Op(
    NAME,
    "(Tensor x, Tensor bases, int steps, str grad, float eps, bool training) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(native=Compiled(NAME, _native), triton=_triton, cuda=NO_CUDA, why_not=why_not),
    flops=_flops,
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    f"{NAME}_backward",
    "(Tensor grad_out, Tensor x, Tensor bases, Tensor coefficients, Tensor history, int steps, str grad, "
    "float eps, bool for_bases) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled(f"{NAME}_backward", _native_backward), triton=_triton_backward, cuda=NO_CUDA, why_not=why_not
    ),
    flops=_backward_flops,
)
differentiate_through_reference(BACKWARD, ("grad_out", "x", "bases"), saved=("coefficients", "history"))
