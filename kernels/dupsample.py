"""DUpsampling in Triton, forward and backward: a matrix product that writes each logit where its pixel is.

    out(n, k, r i + dy, r j + dx) = z(cell, s, k) = (<weight(s, k), x(cell)> + bias(s, k)) / T            s = (dy, dx)

    dx(cell) = 1 / T sum_{s, k} grad_out(cell, s, k) weight(s, k)
    dweight(s, k) = 1 / T sum_cells grad_out(cell, s, k) x(cell)
    dbias(s, k)   = 1 / T sum_cells grad_out(cell, s, k)
    dT       = -1 / T (<weight, dweight> + <bias, dbias>)

Layout: x [N, C, h, w], weight [r * r * K, C], out, grad_out [N, K, H, W], any strides, r (h - 1) < H <= r h.

For one dy the columns of the product are the pairs of dx and class, in the order in which they lie in memory: classes
of a pixel with channels last, pixels of a class in NCHW. Backward gathers, with its walks cut into parts whose sums are
added in order where there would be too few programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import dot
from ._dupsample import (
    accumulator,
    aot_inputs,
    aot_names,
    cells,
    geometry,
    layout,
    load_rows,
    offsets,
    parts_for,
    parts_of,
    products,
    scale_of,
    sum_parts,
    total,
)
from ._launch import Launch

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _columns(
    strides, w_strides, dy, block, R: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ALIGN_W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a block of columns: dx, mask, row and offset of the row in the weight, offset of the pixel in the output.

    BLOCK_R is 0 with channels last, 1 there where pixels are as far apart as there are classes.
    """
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if BLOCK_R <= 1:
        dx = column // K
        k = column % K
        mask = column < R * K
    else:
        dx = column % BLOCK_R
        k = column // BLOCK_R
        mask = k < K
        if BLOCK_R > R:
            mask = mask & (dx < R)
    row = (dy * R + dx) * K + k
    wide_row = row
    if WIDE:
        column = column.to(tl.int64)
        k = k.to(tl.int64)
        wide_row = row.to(tl.int64)
    at = column
    if BLOCK_R != 1:
        at = k * strides[1] + dx * strides[3]
    return dx, mask, row, tl.multiple_of(wide_row * w_strides[0], ALIGN_W), at


@triton.jit
def _pixels(tensor, strides, image, i, j, inside, dy, dx, mask, at, full_size, R: tl.constexpr, CROPPED: tl.constexpr):
    """Pointers to the columns of every cell, and which are pixels."""
    y = i * R + dy
    pixel = image * strides[0] + y * strides[2] + j * R * strides[3]
    mask = (inside & (y < full_size[0]))[:, None] & mask[None, :]
    if CROPPED:
        mask = mask & ((j * R)[:, None] + dx[None, :] < full_size[1])
    return tensor + pixel[:, None] + at[None, :], mask


@triton.jit
def _forward(
    out, x, weight, bias, temperature, out_strides, x_strides, weight_strides,
    count, size, reciprocals, full_size, blocks,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CROPPED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_W: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % blocks
    program = program // blocks
    dy = program % R
    image, i, j, inside = cells(program // R, count, size, reciprocals, BLOCK_M, WIDE)
    x_rows = offsets(x_strides, image, i, j, ALIGN)
    dx, mask, row, w_rows, at = _columns(out_strides, weight_strides, dy, block, R, K, BLOCK_N, BLOCK_R, ALIGN_W, WIDE)
    tile = None
    if C <= BLOCK_C:
        tile = load_rows(x, x_rows, inside, 0, x_strides[1], C, BLOCK_C)
    z = products(
        tile, x, x_rows, inside, x_strides[1], weight, w_rows, mask, weight_strides[1], C, BLOCK_C, ACC, INTERPRET
    )
    if bias is not None:
        z += tl.load(bias + row, mask=mask, other=0.0).to(ACC)[None, :]
    z *= scale_of(temperature, 1.0, ACC)
    pointers, mask = _pixels(out, out_strides, image, i, j, inside, dy, dx, mask, at, full_size, R, CROPPED)
    tl.store(pointers, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_x(
    grad_x, grad_out, weight, temperature, grad_x_strides, grad_out_strides, weight_strides, part_stride,
    count, size, reciprocals, full_size, parts, slices, blocks,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE_C: tl.constexpr, BLOCK_R: tl.constexpr, CROPPED: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_x; with WHOLE unset, part after part, sums over some of the columns."""
    program = tl.program_id(0)
    part = program % parts
    program = program // parts
    slice_ = program % slices * SLICE_C
    image, i, j, inside = cells(program // slices, count, size, reciprocals, BLOCK_M, WIDE)
    acc = tl.zeros([BLOCK_M, SLICE_C], ACC)
    for step in range(part * (R * blocks) // parts, (part + 1) * (R * blocks) // parts):
        dy = step // blocks
        dx, mask, _, w_rows, at = _columns(
            grad_out_strides, weight_strides, dy, step % blocks, R, K, BLOCK_N, BLOCK_R, ALIGN_W, WIDE
        )
        w = load_rows(weight, w_rows, mask, slice_, weight_strides[1], C, SLICE_C)
        pointers, mask = _pixels(
            grad_out, grad_out_strides, image, i, j, inside, dy, dx, mask, at, full_size, R, CROPPED
        )
        acc = dot(tl.load(pointers, mask=mask, other=0.0), w, acc, INTERPRET)
    if WHOLE:
        acc *= scale_of(temperature, 1.0, ACC)
    channel = slice_ + tl.arange(0, SLICE_C)
    at = offsets(grad_x_strides, image, i, j, ALIGN) + part.to(tl.int64) * part_stride
    pointers = grad_x + at[:, None] + (channel.to(at.dtype) * grad_x_strides[1])[None, :]
    tl.store(pointers, acc.to(grad_x.dtype.element_ty), mask=inside[:, None] & (channel < C)[None, :])


@triton.jit
def _backward_weight(
    grad_weight, grad_bias, dots, grad_out, x, weight, bias, temperature,
    grad_weight_strides, grad_out_strides, x_strides, weight_strides, part_stride, bias_part_stride,
    count, size, reciprocals, full_size, parts, slices, blocks,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE_C: tl.constexpr, BLOCK_R: tl.constexpr, CROPPED: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_weight, grad_bias, and their products with weight and bias; with WHOLE unset, part after part."""
    program = tl.program_id(0)
    block = program % blocks
    program = program // blocks
    dy = program % R
    program = program // R
    slice_ = program % slices * SLICE_C
    part = program // slices
    dx, mask, row, w_rows, at = _columns(
        grad_out_strides, weight_strides, dy, block, R, K, BLOCK_N, BLOCK_R, ALIGN_W, WIDE
    )
    acc = tl.zeros([BLOCK_N, SLICE_C], ACC)
    bias_acc = tl.zeros([BLOCK_N], ACC)
    cell_blocks = tl.cdiv(count, BLOCK_M)
    for cell_block in range(cell_blocks * part // parts, cell_blocks * (part + 1) // parts):
        image, i, j, inside = cells(cell_block, count, size, reciprocals, BLOCK_M, WIDE)
        pointers, pixels = _pixels(
            grad_out, grad_out_strides, image, i, j, inside, dy, dx, mask, at, full_size, R, CROPPED
        )
        g = tl.load(pointers, mask=pixels, other=0.0)
        tile = load_rows(x, offsets(x_strides, image, i, j, ALIGN), inside, slice_, x_strides[1], C, SLICE_C)
        acc = dot(tl.trans(g), tile, acc, INTERPRET)
        if grad_bias is not None:
            bias_acc += tl.sum(g.to(ACC), 0)

    if dots is not None:
        w = load_rows(weight, w_rows, mask, slice_, weight_strides[1], C, SLICE_C)
        product = tl.sum(acc * w.to(ACC))
        if grad_bias is not None:
            b = tl.load(bias + row, mask=mask & (slice_ == 0), other=0.0)
            product += tl.sum(bias_acc * b.to(ACC))
        tl.store(dots + tl.program_id(0), product)
    if WHOLE:
        factor = scale_of(temperature, 1.0, ACC)
        acc *= factor
        bias_acc *= factor
    channel = slice_ + tl.arange(0, SLICE_C)
    pointers = grad_weight + part.to(tl.int64) * part_stride + (row.to(tl.int64) * grad_weight_strides[0])[:, None]
    pointers += (channel.to(tl.int64) * grad_weight_strides[1])[None, :]
    tl.store(pointers, acc.to(grad_weight.dtype.element_ty), mask=mask[:, None] & (channel < C)[None, :])
    if grad_bias is not None:
        pointers = grad_bias + part.to(tl.int64) * bias_part_stride + row
        tl.store(pointers, bias_acc.to(grad_bias.dtype.element_ty), mask=mask & (slice_ == 0))


def forward(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, scale_factor: int
) -> None:
    """Writes out [N, K, H, W]."""
    if out.numel():
        _plan_forward(out, x, weight, bias, temperature, scale_factor).run()


def backward(
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_temperature: Tensor,
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    scale_factor: int,
) -> None:
    """Writes the gradients; those of a missing bias or temperature are [0]."""
    gradients = (grad_x, grad_weight, grad_bias, grad_temperature)
    if grad_out.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    for launch in _plan_backward(*gradients, grad_out, x, weight, bias, temperature, scale_factor):
        launch.run()


def _plan_forward(out, x, weight, bias, temperature, scale_factor) -> Launch:
    args = _columns_of(out, x, weight, scale_factor, 128)
    programs = triton.cdiv(args["count"], args["BLOCK_M"]) * scale_factor * args["blocks"]
    args |= {"out": out, "bias": bias, "temperature": temperature, "out_strides": out.stride()}
    del args["SLICE_C"]
    return Launch(_forward, (programs,), args, 8 if x.element_size() == 2 else 4)


def _plan_backward(
    grad_x, grad_weight, grad_bias, grad_temperature, grad_out, x, weight, bias, temperature, scale_factor
) -> list[Launch]:
    args = _columns_of(grad_out, x, weight, scale_factor, 64)
    del args["BLOCK_C"]
    sums, has_bias = accumulator(x), bias is not None
    slices, blocks = triton.cdiv(x.shape[1], args["SLICE_C"]), args["blocks"]
    args |= {"grad_out": grad_out, "grad_out_strides": grad_out.stride(), "slices": slices, "temperature": temperature}
    num_warps, num_stages = (4, 3) if args["SLICE_C"] <= 64 else (8, 2)

    programs = triton.cdiv(args["count"], args["BLOCK_M"]) * slices
    parts = parts_for(programs, scale_factor * blocks, grad_x)
    to_x = grad_x if parts == 1 else parts_of(grad_x, parts, sums)
    for_x = {**args, "grad_x": to_x, "grad_x_strides": grad_x.stride(), "part_stride": grad_x.numel()}
    for_x |= {"parts": parts, "WHOLE": parts == 1, "ALIGN": layout(grad_x)}
    del for_x["x"], for_x["x_strides"]
    launches = [Launch(_backward_x, (programs * parts,), for_x, num_warps, num_stages)]
    if parts > 1:
        launches.append(sum_parts(grad_x, to_x, temperature))

    programs = scale_factor * slices * blocks
    parts = parts_for(programs, triton.cdiv(args["count"], args["BLOCK_M"]), grad_weight)
    to_weight = grad_weight if parts == 1 else parts_of(grad_weight, parts, sums)
    to_bias = grad_bias if parts == 1 else parts_of(grad_bias, parts, sums)
    dots = None if temperature is None else torch.empty(1, programs * parts, dtype=sums, device=x.device)
    for_weight = {
        **args,
        "grad_weight": to_weight,
        "grad_bias": to_bias if has_bias else None,
        "dots": dots,
        "bias": bias,
        "grad_weight_strides": grad_weight.stride(),
        "part_stride": grad_weight.numel(),
        "bias_part_stride": grad_bias.numel(),
        "parts": parts,
        "WHOLE": parts == 1,
    }
    launches.append(Launch(_backward_weight, (programs * parts,), for_weight, num_warps, num_stages))
    if parts > 1:
        launches.append(sum_parts(grad_weight, to_weight, temperature))
        if has_bias:
            launches.append(sum_parts(grad_bias, to_bias, temperature))
    if dots is not None:
        launches.append(total(grad_temperature, dots, None, temperature, None))
    return launches


def _columns_of(out: Tensor, x: Tensor, weight: Tensor, scale_factor: int, most: int) -> dict[str, Any]:
    """Shared arguments: ``geometry``'s and how columns lie in memory; ``out`` is [N, K, H, W]."""
    itemsize = x.element_size()
    if itemsize > 2:
        most = 64 if itemsize == 4 else 16
    classes = out.shape[1]
    block_r = max(triton.next_power_of_2(scale_factor), 2)
    if out.stride(1) == 1 and classes > 1:
        block_r = 1 if out.stride(3) == classes else 0
    columns = scale_factor * classes if block_r <= 1 else classes * block_r
    block_n = min(max(triton.next_power_of_2(columns), 16), most)
    block_c = max(triton.next_power_of_2(x.shape[1]), 16)
    return {
        **geometry(x, weight, scale_factor, [out], 32 if itemsize == 4 else most),
        "blocks": triton.cdiv(columns, block_n),
        "BLOCK_N": block_n,
        "BLOCK_C": min(block_c, 64 if itemsize == 2 else 16),
        "SLICE_C": min(block_c, {2: 128, 4: 64, 8: 16}[itemsize]),
        "BLOCK_R": block_r,
        "CROPPED": out.shape[3] < x.shape[3] * scale_factor,
    }


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named dupsample/kernel/dtype/layout/channels/classes."""
    cases = []
    for dtype, kind, channels, classes in aot_names():
        t = aot_inputs(dtype, kind, channels, classes)
        n, height, width = t["target"].shape
        out = torch.empty(n, classes, height, width, dtype=t["x"].dtype, device="meta")
        out = out.to(memory_format=torch.channels_last) if kind == "channels_last" else out
        inputs = (t["x"], t["weight"], t["bias"], t["temperature"], 16)
        gradients = (t["x"], t["weight"], t["bias"], t["temperature"])
        launches = {"forward": _plan_forward(out, *inputs)}
        for launch in _plan_backward(*gradients, out, *inputs):
            launches[launch.kernel.fn.__name__.removeprefix("_")] = launch
        for name in ("forward", "backward_x", "backward_weight"):
            cases.append((f"dupsample/{name}/{dtype}/{kind}/c{channels}/k{classes}", launches[name]))
    return cases
