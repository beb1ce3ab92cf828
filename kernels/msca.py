"""Multi-scale convolutional attention in Triton: strips, then a 1x1 convolution whose epilogue is the gate.

    forward    gate = W s + b,  out = gate x,  s = strips(x)
    backward   t = g x,  ds = W^T t,  dW = sum_p t s^T,  db = sum_p t,  dx = strips^T(ds) + g gate

Layout: x, s, gate, out [N, C, H, W], any strides; W [C, C]. A row of a product is a pixel. t is made on the way into
both products and is never stored. dW and db are sums over parts of the pixels, then over the parts in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import multi_scale_strip_conv as strips
from ._dot import dot, rounded
from ._launch import Launch
from .multi_scale_strip_conv import at, channels_of, pixels_of

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _project(
    out, gate, left, right, weight, bias, factor,
    out_strides, gate_strides, left_strides, right_strides, weight_strides, bias_strides, factor_strides,
    size, count, C, blocks,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """gate = weight (left right) + bias, out = gate factor; an absent right or factor is 1."""
    image, y, x, inside = pixels_of(tl.program_id(0) // blocks, size, count, BLOCK_P)
    c, exists = channels_of(tl.program_id(0) % blocks, C, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for step in range(tl.cdiv(C, BLOCK_C)):
        k, known = channels_of(step, C, BLOCK_C)
        there = inside[:, None] & known[None, :]
        a = tl.load(at(left, left_strides, image, y, x, k), mask=there, other=0.0)
        if right is not None:
            b = tl.load(at(right, right_strides, image, y, x, k), mask=there, other=0.0)
            a = rounded(a.to(ACC) * b.to(ACC), left.dtype.element_ty, INTERPRET)
        w = weight + (c * weight_strides[0])[None, :] + (k * weight_strides[1])[:, None]
        w = tl.load(w, mask=known[:, None] & exists[None, :], other=0.0)
        acc = dot(a, w, acc, INTERPRET)
    if bias is not None:
        acc += tl.load(bias + c * bias_strides[0], mask=exists, other=0.0).to(ACC)[None, :]
    mask = inside[:, None] & exists[None, :]
    value = rounded(acc, out.dtype.element_ty, INTERPRET)
    if gate is not None:
        tl.store(at(gate, gate_strides, image, y, x, c), value, mask=mask)
    if factor is not None:
        other = tl.load(at(factor, factor_strides, image, y, x, c), mask=mask, other=0.0)
        value = rounded(value.to(ACC) * other.to(ACC), out.dtype.element_ty, INTERPRET)
    tl.store(at(out, out_strides, image, y, x, c), value, mask=mask)


@triton.jit
def _sum_outer(
    parts, sums, left, right, other, left_strides, right_strides, other_strides, size, count, C, blocks, steps,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """parts[part, i, j] = sum over the part's pixels of (left right)_i other_j; sums[part, i] without other."""
    program = tl.program_id(0)
    j, j_exists = channels_of(program % blocks, C, BLOCK_C)
    first = program % blocks == 0
    program = program // blocks
    i, i_exists = channels_of(program % blocks, C, BLOCK_C)
    part = (program // blocks).to(tl.int64)
    acc = tl.zeros([BLOCK_C, BLOCK_C], ACC)
    total = tl.zeros([BLOCK_C], ACC)
    for step in range(steps):
        image, y, x, inside = pixels_of(part * steps + step, size, count, BLOCK_P)
        mask = inside[:, None] & i_exists[None, :]
        a = tl.load(at(left, left_strides, image, y, x, i), mask=mask, other=0.0).to(ACC)
        a *= tl.load(at(right, right_strides, image, y, x, i), mask=mask, other=0.0).to(ACC)
        total += tl.sum(a, 0)
        a = rounded(a, left.dtype.element_ty, INTERPRET)
        b = tl.load(at(other, other_strides, image, y, x, j), mask=inside[:, None] & j_exists[None, :], other=0.0)
        acc = dot(tl.trans(a), b, acc, INTERPRET)
    row = part * C + i
    tl.store(parts + (row * C)[:, None] + j[None, :], acc, mask=i_exists[:, None] & j_exists[None, :])
    tl.store(sums + row, total, mask=i_exists & first)


def forward(out: Tensor, gate: Tensor, sums: Tensor, x: Tensor, proj_weight: Tensor, proj_bias: Tensor | None) -> None:
    """Writes out, and gate unless it is [0], from what the strips gave."""
    if out.numel():
        _projection(out, sums, proj_weight, proj_bias, gate=gate if gate.numel() else None, factor=x).run()


def backward(
    grad_x: Tensor,
    grad_taps: Tensor,
    grad_biases: Tensor,
    grad_proj_weight: Tensor,
    grad_proj_bias: Tensor,
    grad_out: Tensor,
    x: Tensor,
    taps: Tensor,
    biases: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    sums: Tensor,
    gate: Tensor,
    kernel_size: list[int],
    strip_lengths: list[int],
) -> None:
    """Writes the gradients; grad_proj_bias is [0] without a bias."""
    windows = (kernel_size, strip_lengths)
    grad_sums = torch.empty_like(grad_x)
    if x.numel():
        _projection(grad_sums, grad_out, proj_weight.t(), None, right=x).run()
        launch, parts, totals = _outer(grad_out, x, sums)
        launch.run()
        grad_proj_weight.copy_(parts.sum(0))
        if grad_proj_bias.numel():
            grad_proj_bias.copy_(totals.sum(0))
    else:
        grad_proj_weight.zero_(), grad_proj_bias.zero_()
    strips.backward(grad_x, grad_taps, grad_biases, grad_sums, x, taps, biases, grad_out, gate, *windows)


def _common(x: Tensor, most: int) -> dict[str, Any]:
    n, c, h, w = x.shape
    channels = max(min(triton.next_power_of_2(c), most if x.element_size() < 8 else 16), 16)
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"size": (h, w), "count": n * h * w, "C": c, "blocks": triton.cdiv(c, channels), "ACC": acc,
            "BLOCK_P": 128 if x.element_size() == 2 else 64 if x.element_size() == 4 else 16, "BLOCK_C": channels,
            "INTERPRET": triton.knobs.runtime.interpret}  # fmt: skip


def _warps(x: Tensor) -> int:
    return 8 if x.element_size() == 2 else 4  # four spill, in blocks of 128 pixels


def _projection(
    out: Tensor,
    left: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    right: Tensor | None = None,
    gate: Tensor | None = None,
    factor: Tensor | None = None,
) -> Launch:
    tensors = {"out": out, "gate": gate, "left": left, "right": right, "weight": weight, "bias": bias, "factor": factor}
    common = _common(out, 64 if out.element_size() == 2 else 32)
    args: dict[str, Any] = {**tensors, **common}
    args |= {f"{name}_strides": None if m is None else m.stride() for name, m in tensors.items()}
    programs = triton.cdiv(common["count"], common["BLOCK_P"]) * common["blocks"]
    return Launch(_project, (programs,), args, num_warps=_warps(out))


def _outer(left: Tensor, right: Tensor, other: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """The launch, and what it writes: [parts, C, C] and [parts, C]."""
    common = _common(left, 64 if left.element_size() == 2 else 32)
    c, steps = left.shape[1], triton.cdiv(common["count"], common["BLOCK_P"])
    count = min(triton.cdiv(steps, 16), max(528 // common["blocks"] ** 2, 1))
    steps = triton.cdiv(steps, count)
    acc = torch.float64 if left.dtype == torch.float64 else torch.float32
    parts = torch.empty((count, c, c), dtype=acc, device=left.device)
    totals = torch.empty((count, c), dtype=acc, device=left.device)
    args: dict[str, Any] = {
        "parts": parts,
        "sums": totals,
        "left": left,
        "right": right,
        "other": other,
        "steps": steps,
    }
    args |= {f"{name}_strides": args[name].stride() for name in ("left", "right", "other")}
    launch = Launch(_sum_outer, (count * common["blocks"] ** 2,), args | common, num_warps=_warps(left))
    return launch, parts, totals


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named msca/kernel/dtype/layout. Shapes: MSCAN's second stage."""
    cases = []
    for dtype, layout in (("bf16", "channels_last"), ("fp32", "nchw")):
        x = torch.empty(8, 128, 64, 64, dtype=_DTYPES[dtype], device="meta")
        x = x.to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
        weight, bias = (torch.empty(shape, dtype=x.dtype, device="meta") for shape in ((128, 128), (128,)))
        named = {
            "forward": _projection(x, x, weight, bias, gate=x, factor=x),
            "backward": _projection(x, x, weight.t(), None, right=x),
            "backward_weight": _outer(x, x, x)[0],
        }
        cases += [(f"msca/{name}/{dtype}/{layout}", launch) for name, launch in named.items()]
    return cases


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
