"""Cross-entropy of DUpsampling's logits in Triton, forward and backward; the logits never leave registers.

    z(p, c)  = (<weight(s, c), x(cell)> + bias(s, c)) / T           p = sub-pixel s = (dy, dx) of a cell
    lse(p)   = log sum_c exp z(p, c)
    loss(p)  = (1 - e) w_y (lse - z_y) + e / K sum_c w_c (lse - z_c)            y the label, 0 where it is ignored

    dz(p, c) = grad_loss(p) (exp(z - lse) ((1 - e) w_y + e / K sum w) - (1 - e) w_y [c = y] - e / K w_c)
    dx(cell) = 1 / T sum_{s, c} dz(p, c) weight(s, c)
    dweight(s, c) = 1 / T sum_cells dz(p, c) x(cell)                dbias(s, c) = 1 / T sum_cells dz(p, c)
    dT       = -1 / T sum_{p, c} dz z = -1 / T (<weight, dweight> + <bias, dbias>)

Layout: x [N, C, h, w], weight [r * r * K, C], target, lse [N, H, W], any strides, r (h - 1) < H <= r h.

Forward: a program owns a block of cells and one dy, and walks dx. Backward, with z computed again in each: for dx a
program owns cells and walks sub-pixels and classes; for dweight it owns neighbouring dx and a span of classes and walks
the cells. Where that makes too few programs the walk is cut into parts whose sums are added in order. Half-precision
products want dz near 1: a common factor of grad_loss is left out of it until the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import dot, rounded
from ._dupsample import (
    LN2,
    LOG2E,
    LOWEST,
    accumulator,
    aot_inputs,
    aot_names,
    cells,
    forward_configuration,
    geometry,
    half_configuration,
    layout,
    load_rows,
    log2,
    logits,
    offsets,
    parts_for,
    parts_of,
    pixel_offsets,
    products,
    scale_of,
    scaled,
    sum_parts,
    total,
    weight_rows,
    widths,
)
from ._launch import Launch

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _label(target, at, inside, ignore_index, K: tl.constexpr):
    """Labels, 0 where they do not count, and whether they do."""
    label = tl.load(target + at, mask=inside, other=0).to(tl.int64)
    counts = inside & (label >= 0) & (label < K) & (label != ignore_index)
    return tl.where(counts, label, 0).to(tl.int32), counts


@triton.jit
def _class_weight(class_weight, label, counts, ACC: tl.constexpr):
    if class_weight is None:
        return counts.to(ACC)
    else:
        return tl.load(class_weight + label, mask=counts, other=0.0)


@triton.jit
def _weight_sum(class_weight, K: tl.constexpr, ACC: tl.constexpr):
    """Sum of all class weights."""
    if class_weight is None:
        return tl.full([], K, ACC)
    else:
        column = tl.arange(0, triton.next_power_of_2(K))
        return tl.sum(tl.load(class_weight + column, mask=column < K, other=0.0), 0)


@triton.jit
def _smoothed(z, class_weight, first, K: tl.constexpr):
    """sum_c w_c z_c over the classes first ... of a tile."""
    classes = first + tl.arange(0, z.shape[1])
    z = tl.where((classes < K)[None, :], z, 0.0)
    if class_weight is not None:
        z *= tl.load(class_weight + classes, mask=classes < K, other=0.0)[None, :]
    return tl.sum(z, 1)


@triton.jit
def _forward(
    loss, lse, parts, x, weight, target, bias, temperature, class_weight,
    loss_strides, lse_strides, x_strides, weight_strides, target_strides,
    count, size, reciprocals, full_size, ignore_index,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDTHS: tl.constexpr, FIRSTS: tl.constexpr, SPAN: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_W: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """lse, loss where it is per pixel, and sums of weights and losses per program."""
    program = tl.program_id(0)
    dy = program % R
    image, i, j, inside = cells(program // R, count, size, reciprocals, BLOCK_M, WIDE)
    y = i * R + dy
    x_rows = offsets(x_strides, image, i, j, ALIGN)
    label_at = pixel_offsets(target_strides, image, y, j * R)
    lse_at = pixel_offsets(lse_strides, image, y, j * R)
    loss_at = pixel_offsets(loss_strides, image, y, j * R)
    scale = scale_of(temperature, LOG2E, ACC)
    weight_sum = _weight_sum(class_weight, K, ACC)
    tile = None
    if C <= BLOCK_C:
        tile = load_rows(x, x_rows, inside, 0, x_strides[1], C, BLOCK_C)
    inside_y = inside & (y < full_size[0])

    loss_sum = tl.zeros([BLOCK_M], ACC)
    count_sum = tl.zeros([BLOCK_M], ACC)
    for dx in range(R):
        row = (dy * R + dx) * K
        pixel = inside_y & (j * R + dx < full_size[1])
        label, counts = _label(target, label_at + dx * target_strides[2], pixel, ignore_index, K)
        top = tl.full([BLOCK_M], LOWEST, ACC)
        exps = tl.zeros([BLOCK_M], ACC)
        picked = tl.zeros([BLOCK_M], ACC)
        smooth = tl.zeros([BLOCK_M], ACC)
        for first in range(0, K, SPAN):
            for t in tl.static_range(len(WIDTHS)):
                z = logits(
                    tile, x, x_rows, inside, x_strides[1], weight, weight_strides, bias, row, first + FIRSTS[t], scale,
                    K, C, WIDTHS[t], BLOCK_C, ALIGN_W, WIDE, ACC, INTERPRET,
                )  # fmt: skip
                new_top = tl.maximum(top, tl.max(z, 1))
                if len(WIDTHS) > 1 or SPAN < K:
                    exps *= tl.exp2(top - new_top)
                top = new_top
                exps += tl.sum(tl.exp2(z - top[:, None]), 1)
                classes = tl.arange(0, z.shape[1])
                picked += tl.sum(tl.where(classes[None, :] == (label - first - FIRSTS[t])[:, None], z, 0.0), 1)
                if SMOOTHING > 0.0:
                    smooth += _smoothed(z, class_weight, first + FIRSTS[t], K)
        log_sum = top + log2(exps)
        w = _class_weight(class_weight, label, counts, ACC)
        pixel_loss = (1.0 - SMOOTHING) * w * (log_sum - picked)
        if SMOOTHING > 0.0:
            pixel_loss += SMOOTHING / K * (log_sum * weight_sum - smooth)
        pixel_loss = tl.where(counts, pixel_loss * LN2, 0.0)
        loss_sum += pixel_loss
        count_sum += w
        tl.store(lse + lse_at + dx * lse_strides[2], log_sum * LN2, mask=pixel)
        if loss is not None:
            tl.store(loss + loss_at + dx * loss_strides[2], pixel_loss, mask=pixel)

    tl.store(parts + program, tl.sum(count_sum, 0))
    if loss is None:
        tl.store(parts + tl.num_programs(0) + program, tl.sum(loss_sum, 0))


@triton.jit
def _pixel(
    target, lse, grad_loss, unit, class_weight, target_strides, lse_strides, grad_loss_strides, weight_sum,
    image, i, j, inside, dy, dx, full_size, ignore_index,
    R: tl.constexpr, K: tl.constexpr, SMOOTHING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of a sub-pixel of every cell: log2-sum-exp, label, and the factors of dz: of p, at the label, of all classes."""
    y = i * R + dy
    x = j * R + dx
    label, counts = _label(
        target, pixel_offsets(target_strides, image, y, x), inside & (y < full_size[0]) & (x < full_size[1]),
        ignore_index, K,
    )  # fmt: skip
    # +inf makes every p 0, whatever stands in lse where no label counts.
    log_sum = tl.load(lse + pixel_offsets(lse_strides, image, y, x), mask=counts, other=float("inf")) * LOG2E
    at_label = (1.0 - SMOOTHING) * _class_weight(class_weight, label, counts, ACC)
    everywhere = counts.to(ACC) * (SMOOTHING / K)
    if grad_loss is not None:
        g = tl.load(grad_loss + pixel_offsets(grad_loss_strides, image, y, x), mask=counts, other=0.0)
        if unit is not None:
            largest = tl.load(unit)
            g /= tl.where(largest > 0.0, largest, 1.0)
        at_label *= g
        everywhere *= g
    return log_sum, label, at_label + everywhere * weight_sum, at_label, everywhere


@triton.jit
def _gradient(
    z, first, log_sum, label, of_p, at_label, everywhere, class_weight, K: tl.constexpr, SMOOTHING: tl.constexpr
):
    """dz [cells, classes first ...], without the factor 1 / T."""
    classes = tl.arange(0, z.shape[1])
    dz = tl.exp2(z - log_sum[:, None]) * of_p[:, None]
    dz -= tl.where(classes[None, :] == (label - first)[:, None], at_label[:, None], 0.0)
    if SMOOTHING > 0.0:
        if class_weight is None:
            dz -= everywhere[:, None]
        else:
            w = tl.load(class_weight + first + classes, mask=first + classes < K, other=0.0)
            dz -= everywhere[:, None] * w[None, :]
    return dz


@triton.jit
def _backward_x(
    grad_x, grad_loss, unit, x, weight, target, bias, temperature, class_weight, lse,
    grad_x_strides, grad_loss_strides, x_strides, weight_strides, target_strides, lse_strides, part_stride,
    count, size, reciprocals, full_size, parts, slices, ignore_index,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, SLICE_C: tl.constexpr, WIDTHS: tl.constexpr, FIRSTS: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, ALIGN_OUT: tl.constexpr, ALIGN_W: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_x; with WHOLE unset, part after part, sums over some of the sub-pixels."""
    program = tl.program_id(0)
    part = program % parts
    program = program // parts
    slice_ = program % slices * SLICE_C
    image, i, j, inside = cells(program // slices, count, size, reciprocals, BLOCK_M, WIDE)
    x_rows = offsets(x_strides, image, i, j, ALIGN)
    scale = scale_of(temperature, LOG2E, ACC)
    weight_sum = _weight_sum(class_weight, K, ACC)
    tile = None
    if C <= BLOCK_C:
        tile = load_rows(x, x_rows, inside, 0, x_strides[1], C, BLOCK_C)

    acc = tl.zeros([BLOCK_M, SLICE_C], ACC)
    for s in range(part * (R * R) // parts, (part + 1) * (R * R) // parts):
        log_sum, label, of_p, at_label, everywhere = _pixel(
            target, lse, grad_loss, unit, class_weight, target_strides, lse_strides, grad_loss_strides, weight_sum,
            image, i, j, inside, s // R, s % R, full_size, ignore_index, R, K, SMOOTHING, ACC,
        )  # fmt: skip
        for first in range(0, K, SPAN):
            for t in tl.static_range(len(WIDTHS)):
                z = logits(
                    tile, x, x_rows, inside, x_strides[1], weight, weight_strides, bias, s * K, first + FIRSTS[t],
                    scale, K, C, WIDTHS[t], BLOCK_C, ALIGN_W, WIDE, ACC, INTERPRET,
                )  # fmt: skip
                dz = _gradient(
                    z, first + FIRSTS[t], log_sum, label, of_p, at_label, everywhere, class_weight, K, SMOOTHING
                )
                w_rows, w_inside = weight_rows(weight_strides, s * K, first + FIRSTS[t], K, WIDTHS[t], ALIGN_W, WIDE)
                w = load_rows(weight, w_rows, w_inside, slice_, weight_strides[1], C, SLICE_C)
                acc = dot(rounded(dz, w.dtype, INTERPRET), w, acc, INTERPRET)

    if WHOLE:
        acc *= scale_of(temperature, 1.0, ACC)
        if unit is not None:
            acc *= tl.load(unit)
    channel = slice_ + tl.arange(0, SLICE_C)
    at = offsets(grad_x_strides, image, i, j, ALIGN_OUT) + part.to(tl.int64) * part_stride
    pointers = grad_x + at[:, None] + (channel.to(at.dtype) * grad_x_strides[1])[None, :]
    tl.store(pointers, acc.to(grad_x.dtype.element_ty), mask=inside[:, None] & (channel < C)[None, :])


@triton.jit
def _backward_weight(
    grad_weight, grad_bias, dots, grad_loss, unit, x, weight, target, bias, temperature, class_weight, lse,
    grad_weight_strides, grad_loss_strides, x_strides, weight_strides, target_strides, lse_strides, part_stride,
    bias_part_stride, count, size, reciprocals, full_size, parts, slices, spans, groups, ignore_index,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, SLICE_C: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, ALIGN_W: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_weight, grad_bias, and their products with weight and bias; with WHOLE unset, part after part."""
    program = tl.program_id(0)
    first = program % spans * WIDTH
    program = program // spans
    group = program % groups
    program = program // groups
    dy = program % R
    program = program // R
    slice_ = program % slices * SLICE_C
    part = program // slices
    scale = scale_of(temperature, LOG2E, ACC)
    weight_sum = _weight_sum(class_weight, K, ACC)
    weights = ()
    sums = ()
    bias_sums = ()
    for g in tl.static_range(GROUP):
        w = 0
        if C <= BLOCK_C:
            w_rows, w_inside = weight_rows(
                weight_strides, (dy * R + group * GROUP + g) * K, first, K, WIDTH, ALIGN_W, WIDE
            )
            w = load_rows(weight, w_rows, w_inside, 0, weight_strides[1], C, BLOCK_C)
        weights += (w,)
        sums += (tl.zeros([SLICE_C, WIDTH], ACC),)
        bias_sums += (tl.zeros([BLOCK_M, WIDTH], ACC),)

    blocks = tl.cdiv(count, BLOCK_M)
    for block in range(blocks * part // parts, blocks * (part + 1) // parts):
        image, i, j, inside = cells(block, count, size, reciprocals, BLOCK_M, WIDE)
        x_rows = offsets(x_strides, image, i, j, ALIGN)
        tile = load_rows(x, x_rows, inside, slice_, x_strides[1], C, SLICE_C)
        new_sums = ()
        new_bias_sums = ()
        for g in tl.static_range(GROUP):
            dx = group * GROUP + g
            row = (dy * R + dx) * K
            log_sum, label, of_p, at_label, everywhere = _pixel(
                target, lse, grad_loss, unit, class_weight, target_strides, lse_strides, grad_loss_strides, weight_sum,
                image, i, j, inside, dy, dx, full_size, ignore_index, R, K, SMOOTHING, ACC,
            )  # fmt: skip
            if C <= BLOCK_C:
                acc = dot(tile, tl.trans(weights[g]), tl.zeros([BLOCK_M, WIDTH], ACC), INTERPRET)
            else:
                w_rows, w_inside = weight_rows(weight_strides, row, first, K, WIDTH, ALIGN_W, WIDE)
                acc = products(
                    None, x, x_rows, inside, x_strides[1], weight, w_rows, w_inside, weight_strides[1], C, BLOCK_C,
                    ACC, INTERPRET,
                )  # fmt: skip
            z = scaled(acc, bias, row, first, scale, K, WIDTH)
            dz = _gradient(z, first, log_sum, label, of_p, at_label, everywhere, class_weight, K, SMOOTHING)
            new_sums += (dot(tl.trans(tile), rounded(dz, tile.dtype, INTERPRET), sums[g], INTERPRET),)
            bias_sum = bias_sums[g]
            if grad_bias is not None:
                bias_sum += dz
            new_bias_sums += (bias_sum,)
        sums = new_sums
        bias_sums = new_bias_sums

    factor = tl.full([], 1.0, ACC)
    if WHOLE:
        factor = scale_of(temperature, 1.0, ACC)
        if unit is not None:
            factor *= tl.load(unit)
    product = tl.zeros([], ACC)
    for g in tl.static_range(GROUP):
        dx = group * GROUP + g
        row = (dy * R + dx) * K
        w_rows, w_inside = weight_rows(weight_strides, row, first, K, WIDTH, ALIGN_W, WIDE)
        channel = slice_ + tl.arange(0, SLICE_C)
        if dots is not None:
            w = load_rows(weight, w_rows, w_inside, slice_, weight_strides[1], C, SLICE_C)
            product += tl.sum(tl.trans(sums[g]) * w.to(ACC))
        rows = (row + first + tl.arange(0, WIDTH)).to(tl.int64)
        pointers = grad_weight + part.to(tl.int64) * part_stride + (rows * grad_weight_strides[0])[:, None]
        pointers += (channel.to(tl.int64) * grad_weight_strides[1])[None, :]
        tl.store(
            pointers, (tl.trans(sums[g]) * factor).to(grad_weight.dtype.element_ty),
            mask=w_inside[:, None] & (channel < C)[None, :],
        )  # fmt: skip
        if grad_bias is not None:
            bias_sum = tl.sum(bias_sums[g], 0)
            mask = w_inside & (slice_ == 0)
            if dots is not None:
                product += tl.sum(bias_sum * tl.load(bias + rows, mask=mask, other=0.0).to(ACC))
            at = part.to(tl.int64) * bias_part_stride + rows
            tl.store(grad_bias + at, (bias_sum * factor).to(grad_bias.dtype.element_ty), mask=mask)
    if dots is not None:
        tl.store(dots + tl.program_id(0), product)


def forward(
    loss: Tensor,
    count: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    class_weight: Tensor | None,
    scale_factor: int,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Writes loss [N, H, W] or its sum [], count [] and lse [N, H, W]."""
    if lse.numel() == 0:
        loss.zero_(), count.zero_()
        return
    tensors = (loss, count, lse, x, weight, target, bias, temperature, class_weight)
    for launch in _plan_forward(*tensors, scale_factor, ignore_index, label_smoothing):
        launch.run()


def backward(
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_temperature: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    class_weight: Tensor | None,
    lse: Tensor,
    scale_factor: int,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Writes the gradients; those of a missing bias or temperature are [0]. ``grad_loss`` [N, H, W] or []."""
    if lse.numel() == 0:
        for gradient in (grad_x, grad_weight, grad_bias, grad_temperature):
            gradient.zero_()
        return
    gradients = (grad_x, grad_weight, grad_bias, grad_temperature)
    tensors = (grad_loss, x, weight, target, bias, temperature, class_weight, lse)
    for launch in _plan_backward(*gradients, *tensors, scale_factor, ignore_index, label_smoothing):
        launch.run()


def _plan_forward(
    loss, count, lse, x, weight, target, bias, temperature, class_weight, scale_factor, ignore_index, label_smoothing
) -> list[Launch]:
    config = forward_configuration(x.shape[1], weight.shape[0] // scale_factor**2, x.element_size())
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    pixels = [target, lse, loss] if loss.dim() else [target, lse]
    args = geometry(x, weight, scale_factor, pixels, config.pop("BLOCK_M")) | config
    programs = triton.cdiv(args["count"], args["BLOCK_M"]) * scale_factor
    parts = torch.empty(1 if loss.dim() else 2, programs, dtype=loss.dtype, device=loss.device)
    args |= {
        "loss": loss if loss.dim() else None,
        "lse": lse,
        "parts": parts,
        "target": target,
        "bias": bias,
        "temperature": temperature,
        "class_weight": class_weight,
        "loss_strides": loss.stride() if loss.dim() else (0, 0, 0),
        "lse_strides": lse.stride(),
        "target_strides": target.stride(),
        "ignore_index": ignore_index,
        "SMOOTHING": label_smoothing,
    }
    sums = total(count, parts, None if loss.dim() else loss)
    return [Launch(_forward, (programs,), args, num_warps, num_stages), sums]


def _plan_backward(
    grad_x, grad_weight, grad_bias, grad_temperature, grad_loss, x, weight, target, bias, temperature, class_weight,
    lse, scale_factor, ignore_index, label_smoothing,
) -> list[Launch]:  # fmt: skip
    common = {
        "grad_loss": grad_loss if grad_loss.dim() else None,
        "unit": _unit(grad_loss, x),
        "target": target,
        "bias": bias,
        "temperature": temperature,
        "class_weight": class_weight,
        "lse": lse,
        "grad_loss_strides": grad_loss.stride() if grad_loss.dim() else (0, 0, 0),
        "target_strides": target.stride(),
        "lse_strides": lse.stride(),
        "ignore_index": ignore_index,
        "SMOOTHING": label_smoothing,
    }
    classes, channels, itemsize = weight.shape[0] // scale_factor**2, x.shape[1], x.element_size()
    pixels = [target, lse, grad_loss] if grad_loss.dim() else [target, lse]
    sums = accumulator(x)
    finish = (temperature, common["unit"])

    config = backward_x_configuration(channels, classes, itemsize)
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    args = geometry(x, weight, scale_factor, pixels, config.pop("BLOCK_M")) | common | config
    slices = triton.cdiv(channels, args["SLICE_C"])
    programs = triton.cdiv(args["count"], args["BLOCK_M"]) * slices
    parts = parts_for(programs, scale_factor**2, grad_x)
    target_x = grad_x if parts == 1 else parts_of(grad_x, parts, sums)
    args |= {"grad_x": target_x, "grad_x_strides": grad_x.stride(), "part_stride": grad_x.numel()}
    args |= {"parts": parts, "slices": slices, "WHOLE": parts == 1, "ALIGN_OUT": layout(grad_x)}
    launches = [Launch(_backward_x, (programs * parts,), args, num_warps, num_stages)]
    if parts > 1:
        launches.append(sum_parts(grad_x, target_x, *finish))

    config = backward_weight_configuration(scale_factor, channels, classes, itemsize, layout(x))
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    args = geometry(x, weight, scale_factor, pixels, config.pop("BLOCK_M")) | common | config
    counts = {
        "slices": triton.cdiv(channels, args["SLICE_C"]),
        "spans": triton.cdiv(classes, args["WIDTH"]),
        "groups": scale_factor // args["GROUP"],
    }
    programs = scale_factor * math.prod(counts.values())
    parts = parts_for(programs, triton.cdiv(args["count"], args["BLOCK_M"]), grad_weight)
    has_bias = bias is not None
    target_weight, target_bias = grad_weight, grad_bias if has_bias else None
    if parts > 1:
        target_weight = parts_of(grad_weight, parts, sums)
        target_bias = parts_of(grad_bias, parts, sums) if has_bias else None
    dots = None
    if temperature is not None:
        dots = torch.empty(1, programs * parts, dtype=sums, device=x.device)
    args |= {
        "grad_weight": target_weight,
        "grad_bias": target_bias,
        "dots": dots,
        "grad_weight_strides": grad_weight.stride(),
        "part_stride": grad_weight.numel(),
        "bias_part_stride": grad_bias.numel(),
        "parts": parts,
        "WHOLE": parts == 1,
        **counts,
    }
    launches.append(Launch(_backward_weight, (programs * parts,), args, num_warps, num_stages))
    if parts > 1:
        launches.append(sum_parts(grad_weight, target_weight, *finish))
        if has_bias:
            launches.append(sum_parts(grad_bias, target_bias, *finish))
    if temperature is not None:
        launches.append(total(grad_temperature, dots, None, *finish))
    return launches


def _unit(grad_loss: Tensor, x: Tensor) -> Tensor | None:
    """What every grad_loss is a multiple of, or the largest of them where float16 could not hold them."""
    if grad_loss.dim() == 0:
        return grad_loss
    return torch.linalg.vector_norm(grad_loss, float("inf")) if x.dtype == torch.float16 else None


def backward_x_configuration(channels: int, classes: int, itemsize: int) -> dict[str, Any]:
    """Blocks of cells, channels and classes, warps and stages."""
    block_c = max(triton.next_power_of_2(channels), 16)
    if itemsize == 2:
        return {**half_configuration(channels, classes, 64, 32), "BLOCK_M": 64, "SLICE_C": min(block_c, 256),
                "num_warps": 4 if block_c <= 128 else 8, "num_stages": 2}  # fmt: skip
    if itemsize == 4:
        return {**widths(classes, 16, 32, 32), "BLOCK_M": 64, "BLOCK_C": 16, "SLICE_C": min(block_c, 64),
                "num_warps": 4, "num_stages": 2}  # fmt: skip
    return {**widths(classes, 16, 16, 16), "BLOCK_M": 16, "BLOCK_C": 16, "SLICE_C": 16, "num_warps": 4, "num_stages": 1}


def backward_weight_configuration(
    scale_factor: int, channels: int, classes: int, itemsize: int, align: int
) -> dict[str, Any]:
    """Two sub-pixels a program where the addresses of one cell's channels leave the registers for it."""
    block_c = max(triton.next_power_of_2(channels), 16)
    width = max(triton.next_power_of_2(classes), 16)
    if itemsize == 2:
        resident = block_c <= 128
        group = math.gcd(scale_factor, 2) if block_c <= 64 and abs(align) > 1 else 1
        return {"BLOCK_M": 64, "BLOCK_C": block_c if resident else 64, "SLICE_C": min(block_c, 128), "GROUP": group,
                "WIDTH": min(width, 32), "num_warps": 4 if resident else 8, "num_stages": 2}  # fmt: skip
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_C": 16, "SLICE_C": min(block_c, 64), "WIDTH": min(width, 32), "GROUP": 1,
                "num_warps": 4, "num_stages": 2}  # fmt: skip
    return {"BLOCK_M": 16, "BLOCK_C": 16, "SLICE_C": 16, "WIDTH": 16, "GROUP": 1, "num_warps": 4, "num_stages": 1}


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named dupsample_cross_entropy/kernel/dtype/layout/channels/classes."""
    cases = []
    for dtype, kind, channels, classes in aot_names():
        t = aot_inputs(dtype, kind, channels, classes)
        gradients = (t["x"], t["weight"], t["bias"], t["temperature"])
        inputs = (t["x"], t["weight"], t["target"], t["bias"], t["temperature"], None)
        launches = [
            *_plan_forward(t["scalar"], t["scalar"], t["map"], *inputs, 16, 255, 0.0),
            *_plan_backward(*gradients, t["scalar"], *inputs, t["map"], 16, 255, 0.0),
        ]
        for launch in launches:
            name = launch.kernel.fn.__name__.removeprefix("_")
            if name in ("forward", "backward_x", "backward_weight"):
                cases.append((f"dupsample_cross_entropy/{name}/{dtype}/{kind}/c{channels}/k{classes}", launch))
    return cases
