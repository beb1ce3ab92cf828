"""Non-negative matrix factorisation in Triton: C *= (X^T B) / (C (B^T B) + eps), B *= (X C) / (B (C^T C) + eps).

Layout: x [N, C, H, W], any strides, seen as X [N, C, n]; bases [N, C, R], coefficients [N, n, R].

The matrix products, which are all of the cost, are torch's, in float32 by torch's matmul precision (float64 for
float64). What stands between two of them is one kernel, elementwise over [N, rows, R]: forward two arrays become the
updated factor, written where backward and the next product read it; backward four become three.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch

__all__ = ["aot_cases", "backward", "forward"]

_BLOCK = 1024


@triton.jit
def _update(
    out, factor, numerator, denominator, out_step, factor_step, elements, blocks, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor * numerator / (denominator + EPS), from image to image by the steps."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    at = image * elements + i
    value = tl.load(factor + image * factor_step + i, mask=inside, other=0.0)
    n = tl.load(numerator + at, mask=inside, other=0.0)
    d = tl.load(denominator + at, mask=inside, other=1.0)
    tl.store(out + image * out_step + i, value * n / (d + EPS), mask=inside)


@triton.jit
def _update_backward(
    grad_numerator, grad_denominator, grad, factor, updated, denominator, factor_step, updated_step, elements,
    blocks, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of updated = factor * N / D with D = denominator + EPS and ``grad`` of updated: dN, dD, and in the place of
    ``grad`` the part of the factor's gradient that goes through neither. N / D is updated / factor, 0 for 0 / 0."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    at = image * elements + i
    g = tl.load(grad + at, mask=inside, other=0.0)
    d = tl.load(denominator + at, mask=inside, other=1.0) + EPS
    f = tl.load(factor + image * factor_step + i, mask=inside, other=0.0)
    u = tl.load(updated + image * updated_step + i, mask=inside, other=0.0)
    ratio = tl.where(f == 0, 0.0, u / tl.where(f == 0, 1.0, f))
    dn = g * f / d
    tl.store(grad_numerator + at, dn, mask=inside)
    tl.store(grad_denominator + at, -dn * ratio, mask=inside)
    tl.store(grad + at, g * ratio, mask=inside)


def forward(
    out: Tensor, coefficients: Tensor, history: Tensor, x: Tensor, bases: Tensor, steps: int, grad: str, eps: float
) -> None:
    """Writes out and, where they are not [0], what backward reads."""
    if not out.numel():
        return
    v = x.flatten(2).to(bases.dtype)
    unrolled = grad == "unrolled" and coefficients.numel() > 0

    def room(kept: Tensor, update: int, like: Tensor) -> Tensor:
        return kept[:, update] if unrolled else torch.empty_like(like, memory_format=torch.contiguous_format)

    b = bases.contiguous()
    numerator = v.mT @ b
    c = room(coefficients, 0, numerator)
    c.copy_(numerator.softmax(2))
    for t in range(steps + 1):
        if t:
            numerator = v.mT @ b
        if t == steps and coefficients.numel() and not unrolled:
            coefficients[:, 0] = c
            history[:, 0] = b
        updated = room(coefficients, t + 1, c)
        _plan(updated, c, numerator, c @ (b.mT @ b), eps).run()
        c = updated
        if t < steps:
            updated = room(history, t, b)
            _plan(updated, b, v @ c, b @ (c.mT @ c), eps).run()
            b = updated
    out.copy_((b @ c.mT).view(out.shape))


def backward(
    grad_x: Tensor,
    grad_bases: Tensor,
    grad_out: Tensor,
    x: Tensor,
    bases: Tensor,
    coefficients: Tensor,
    history: Tensor,
    grad: str,
    eps: float,
) -> None:
    """Writes the gradient of x and, unless it is [0], that of the bases."""
    if not x.numel():
        return
    v, g_out = (y.flatten(2).to(bases.dtype) for y in (x, grad_out))
    if grad == "one_step":
        b, c = history[:, 0], coefficients[:, 0]
        numerator = torch.empty_like(c, memory_format=torch.contiguous_format)
        _plan(numerator, c, g_out.mT @ b, c @ (b.mT @ b), eps).run()
        grad_x.copy_((b @ numerator.mT).view(grad_x.shape))
        return
    steps = history.shape[1]
    all_bases = [bases.contiguous(), *history.unbind(1)]
    all_coefficients = coefficients.unbind(1)
    # Gradients of the factors after the update that the loop has come to.
    dc, db = g_out.mT @ all_bases[-1], g_out @ all_coefficients[-1]
    left, right = [], []
    for t in reversed(range(steps + 1)):
        b, c = all_bases[t], all_coefficients[t]
        square = b.mT @ b
        dn, dd = _pull_back(dc, c, all_coefficients[t + 1], c @ square, eps)
        dc += dd @ square
        if t == 0:
            dn += c * (dc - (dc * c).sum(2, keepdim=True))
        left.append(b)
        right.append(dn)
        if t or grad_bases.numel():
            dg = c.mT @ dd
            db += v @ dn + b @ (dg + dg.mT)
        if t:
            before, square = all_bases[t - 1], c.mT @ c
            dm, de = _pull_back(db, before, b, before @ square, eps)
            dk = before.mT @ de
            db += de @ square
            dc += v.mT @ dm + c @ (dk + dk.mT)
            left.append(dm)
            right.append(c)
    grad_x.copy_((torch.cat(left, 2) @ torch.cat(right, 2).mT).view(grad_x.shape))
    if grad_bases.numel():
        grad_bases.copy_(db)


def _pull_back(grad: Tensor, factor: Tensor, updated: Tensor, denominator: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dN and dD; ``grad`` is changed in place."""
    dn, dd = torch.empty_like(denominator), torch.empty_like(denominator)
    _plan_backward(dn, dd, grad, factor, updated, denominator, eps).run()
    return dn, dd


def _plan(out: Tensor, factor: Tensor, numerator: Tensor, denominator: Tensor, eps: float) -> Launch:
    args: dict[str, Any] = {
        "out": out,
        "factor": factor,
        "numerator": numerator,
        "denominator": denominator,
        "out_step": out.stride(0),
        "factor_step": factor.stride(0),
    }
    return _launch(_update, args, out, eps)


def _plan_backward(dn: Tensor, dd: Tensor, grad: Tensor, factor: Tensor, updated: Tensor, denominator: Tensor,
                   eps: float) -> Launch:  # fmt: skip
    args: dict[str, Any] = {
        "grad_numerator": dn,
        "grad_denominator": dd,
        "grad": grad,
        "factor": factor,
        "updated": updated,
        "denominator": denominator,
        "factor_step": factor.stride(0),
        "updated_step": updated.stride(0),
    }
    return _launch(_update_backward, args, factor, eps)


def _launch(kernel: Any, args: dict[str, Any], like: Tensor, eps: float) -> Launch:
    """Images may lie apart; each is contiguous."""
    elements = like[0].numel()
    blocks = triton.cdiv(elements, _BLOCK)
    args |= {"EPS": eps, "elements": elements, "blocks": blocks, "BLOCK": _BLOCK}
    return Launch(kernel, (like.shape[0] * blocks,), args)


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named nmf2d/kernel/dtype."""
    cases = []
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        c = torch.empty(1, 4096, 64, dtype=dtype, device="meta")
        cases.append((f"nmf2d/update/{name}", _plan(c, c, c, c, 1e-6)))
        cases.append((f"nmf2d/backward/{name}", _plan_backward(c, c, c, c, c, c, 1e-6)))
    return cases
