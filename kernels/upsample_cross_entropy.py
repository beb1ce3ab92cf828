"""Bilinear upsampling, log-softmax and cross-entropy in one pass, forward and backward, in Triton.

    z_c  = sum over the four source pixels around an output pixel of w_y w_x logits_c        lse = log sum_c exp z_c
    loss = (1 - e) w_y (lse - z_y) + e / K sum_c w_c (lse - z_c)       y the label, w class weights, e label smoothing
    count = sum of w_y                                                 ignored pixels: 0 and 0

    dz_c = g (p_c ((1 - e) w_y + e / K sum_c w_c) - (1 - e) w_y [c = y] - e / K w_c)        p_c = exp(z_c - lse)
    grad_logits_c(i, j) = sum over the output pixels that touch (i, j), of w_y w_x dz_c

Layout: logits [N, K, h, w], target [N, H, W], lse [N, H, W], loss [N, H, W] or a sum, any strides; cells: _bilinear.py.

Forward takes classes in blocks: a lane's output pixels keep a running maximum and sum each, rescaled once per block.

Backward is a transposed gather without atomics: a lane walks down a strip of STRIP + 1 cells, for CLASS_BLOCK classes,
and sums what its output pixels give to its four corners; the right corners then move one lane to the right. Lanes are
numbered along the rows of all strips, and only the first of a program's 32 lanes repeats its neighbour's work: an
exponential is computed (1 + 1 / STRIP) * 32 / 31 times. One warp: the move is a shuffle, without a barrier.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _bilinear as bilinear
from ._bilinear import (
    LN2,
    LOG2E,
    LOWEST,
    along_row,
    begin,
    bind,
    corner_offsets,
    lane_cells,
    load_corners,
    load_labels,
    load_pixels,
    pixel_masks,
    store_pixels,
    weight,
    weights_along,
)
from ._dupsample import log2
from ._launch import Launch

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _absorb(
    top, total, blends, plane, offsets, stride, first, class_weight, rows, columns,
    COUNT: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    SMOOTHING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Running maximum (in units of log 2) and sum of every output pixel, and weighted sums of the corners.

    The sums of the corners, over classes, are what label smoothing needs: the blend of them is the sum of the blends.
    """
    values = load_corners(plane, offsets, stride, first, COUNT, CLASSES, TILE, ACC)
    if SMOOTHING != 0.0:
        sums = blends
        for n in tl.static_range(COUNT):
            w = 1.0
            if class_weight is not None:
                w = tl.load(class_weight + first + n)
            sums = (
                sums[0] + w * values[0][n],
                sums[1] + w * values[1][n],
                sums[2] + w * values[2][n],
                sums[3] + w * values[3][n],
            )
        blends = sums
    new_top = ()
    new_total = ()
    for r in tl.static_range(PY):
        left, across = along_row(values, rows[r], COUNT)
        for d in tl.static_range(PX):
            z = ()
            highest = left[0] + columns[d] * across[0]
            for n in tl.static_range(COUNT):
                z += (left[n] + columns[d] * across[n],)
                highest = tl.maximum(highest, z[n])
            before = top[r * PX + d]
            after = tl.maximum(before, highest * LOG2E)
            sum_ = total[r * PX + d] * tl.exp2(before - after)
            for n in tl.static_range(COUNT):
                sum_ += tl.exp2(z[n] * LOG2E - after)
            new_top += (after,)
            new_total += (sum_,)
    return new_top, new_total, blends


@triton.jit
def _forward(
    loss, count, lse, logits, target, class_weight, weight_sum,
    loss_strides, lse_strides, logits_strides, target_strides, size, full, cells, parts, blocks, ignore_index,
    CLASSES: tl.constexpr, SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr, CORNERS: tl.constexpr,
    FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, CLASS_BLOCK: tl.constexpr,
    TILED: tl.constexpr, ALIGN: tl.constexpr, PIXEL_ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """`loss` and `count` [programs] receive this program's sums, or `loss` one value per pixel."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    lane = program % blocks * BLOCK + tl.arange(0, BLOCK)
    i, j, y, x, y_end, x_end, alive = lane_cells(
        lane, size, full, cells, parts, CORNERS, FACTOR_Y, FACTOR_X, PY, PX, WIDE
    )
    top = ()
    total = ()
    for _ in tl.static_range(PY * PX):
        top += (tl.full([BLOCK], LOWEST, ACC),)
        total += (tl.zeros([BLOCK], ACC),)
    rows = weights_along(y, i, size[0], full[0], PY, FACTOR_Y, CORNERS, ACC)
    columns = weights_along(x, j, size[1], full[1], PX, FACTOR_X, CORNERS, ACC)
    zero = tl.zeros([BLOCK], ACC)
    blends = (zero, zero, zero, zero)
    plane = logits + tl.multiple_of(image * logits_strides[0], ALIGN)
    offsets = corner_offsets(i, j, size, logits_strides, ALIGN)
    stride = logits_strides[1]
    TILE: tl.constexpr = CLASS_BLOCK if TILED else 0
    TAIL: tl.constexpr = CLASSES % CLASS_BLOCK
    # The last parts of cells of unequal length are mostly empty: 4 x 4 and a fifth row here and there.
    whole = tl.where(tl.max(alive.to(tl.int32), 0) > 0, CLASSES - TAIL, 0)
    for first in range(0, whole, CLASS_BLOCK):
        top, total, blends = _absorb(
            top, total, blends, plane, offsets, stride, first, class_weight, rows, columns,
            CLASS_BLOCK, CLASSES, TILE, PY, PX, SMOOTHING, ACC,
        )  # fmt: skip
    if TAIL:
        top, total, blends = _absorb(
            top, total, blends, plane, offsets, stride, CLASSES - TAIL, class_weight, rows, columns,
            TAIL, CLASSES, TILE, PY, PX, SMOOTHING, ACC,
        )  # fmt: skip

    target += image * target_strides[0]
    lse += image * lse_strides[0]
    if PER_PIXEL:
        loss += image * loss_strides[0]
    total_weight = CLASSES if weight_sum is None else tl.load(weight_sum)
    loss_sum = tl.zeros([BLOCK], ACC)
    count_sum = tl.zeros([BLOCK], ACC)
    for r in tl.static_range(PY):
        masks = pixel_masks(x, alive & (y + r >= 0) & (y + r < y_end), x_end, full[1], PX, FACTOR_X, PIXEL_ALIGN)
        labels = load_labels(target, target_strides, y + r, x, masks, ignore_index, CLASSES, PX, PIXEL_ALIGN)
        row_lse = ()
        row_loss = ()
        for d in tl.static_range(PX):
            valid = labels[d] >= 0
            label = tl.where(valid, labels[d], 0).to(offsets[0].dtype)
            at = plane + label * stride
            a = tl.load(at + offsets[0]).to(ACC)
            b = tl.load(at + offsets[1]).to(ACC)
            a += rows[r] * (tl.load(at + offsets[2]).to(ACC) - a)
            b += rows[r] * (tl.load(at + offsets[3]).to(ACC) - b)
            z = a + columns[d] * (b - a)
            log_total = (top[r * PX + d] + log2(total[r * PX + d])) * LN2
            w = tl.where(valid, 1.0, 0.0).to(ACC)
            if class_weight is not None:
                w = tl.load(class_weight + label, mask=valid, other=0.0)
            value = tl.where(valid, (1.0 - SMOOTHING) * w * (log_total - z), 0.0)
            if SMOOTHING != 0.0:
                a = blends[0] + rows[r] * (blends[2])
                b = blends[1] + rows[r] * (blends[3])
                z = a + columns[d] * (b - a)
                value += tl.where(valid, SMOOTHING / CLASSES * (log_total * total_weight - z), 0.0)
            loss_sum += value
            count_sum += w
            row_lse += (log_total,)
            row_loss += (value,)
        store_pixels(lse, lse_strides, y + r, x, row_lse, masks, PX, PIXEL_ALIGN)
        if PER_PIXEL:
            store_pixels(loss, loss_strides, y + r, x, row_loss, masks, PX, PIXEL_ALIGN)
    tl.store(count + program, tl.sum(count_sum, 0))
    if not PER_PIXEL:
        tl.store(loss + program, tl.sum(loss_sum, 0))


@triton.jit
def _backward(
    grad_logits, grad_loss, logits, target, class_weight, weight_sum, lse,
    grad_logits_strides, grad_loss_strides, logits_strides, target_strides, lse_strides,
    size, full, cells, strips, blocks, ignore_index,
    CLASSES: tl.constexpr, SMOOTHING: tl.constexpr, PER_PIXEL: tl.constexpr, CORNERS: tl.constexpr,
    FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, PARTS: tl.constexpr, PX: tl.constexpr, STRIP: tl.constexpr,
    CLASS_BLOCK: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, PIXEL_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Source rows and columns of a strip of cells, for CLASS_BLOCK classes; the classes of a strip run side by side."""
    WEIGHTED: tl.constexpr = PER_PIXEL or class_weight is not None
    program = tl.program_id(0)
    groups: tl.constexpr = (CLASSES + CLASS_BLOCK - 1) // CLASS_BLOCK
    first = program % groups * CLASS_BLOCK
    program = program // groups
    image = (program // blocks).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    at = program % blocks * (BLOCK - 1) + lane - 1
    j = at % cells
    strip = at // cells
    alive = (at >= 0) & (strip < strips)
    i = strip * STRIP - 1
    if not CORNERS:
        j -= 1
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
        first = first.to(tl.int64)
    x = begin(j, size[1], full[1], CORNERS, FACTOR_X)
    x_end = begin(j + 1, size[1], full[1], CORNERS, FACTOR_X)
    plane = logits + tl.multiple_of(image * logits_strides[0], ALIGN)
    grad_plane = grad_logits + tl.multiple_of(image * grad_logits_strides[0], ALIGN)
    target += image * target_strides[0]
    lse += image * lse_strides[0]
    stride = logits_strides[1]
    if PER_PIXEL:
        grad_loss += image * grad_loss_strides[0]
        factor = 1.0
    else:
        factor = tl.load(grad_loss)
    total_weight = CLASSES if weight_sum is None else tl.load(weight_sum)
    columns = ()
    if PARTS == 1:
        columns = _edge_weights(x, j, size[1], full[1], PX, FACTOR_X, CORNERS, ACC)

    zero = tl.zeros([BLOCK], ACC)
    zeros = ()
    for _ in tl.static_range(CLASS_BLOCK):
        zeros += (zero,)
    lower = zeros
    for k in range(STRIP + 1):
        offsets = corner_offsets(i, j, size, logits_strides, ALIGN)
        values = load_corners(plane, offsets, stride, first, CLASS_BLOCK, CLASSES, TILE, ACC)
        upper = lower
        lower = zeros
        y = begin(i, size[0], full[0], CORNERS, FACTOR_Y)
        y_end = tl.minimum(begin(i + 1, size[0], full[0], CORNERS, FACTOR_Y), full[0])
        y_end = tl.where(alive & (i < size[0]), y_end, y)
        for row in range(tl.max(y_end - y, 0)):
            down = weight(y + row, i, size[0], full[0], CORNERS, ACC)
            down = tl.where(i < 0, 1.0, tl.where(i >= size[0] - 1, 0.0, down))
            inside = (y + row >= 0) & (y + row < y_end)
            sums = zeros
            rights = zeros
            for part in range(PARTS):
                from_x = x + part * PX
                if PARTS > 1:
                    columns = _edge_weights(from_x, j, size[1], full[1], PX, FACTOR_X, CORNERS, ACC)
                masks = pixel_masks(from_x, inside, x_end, full[1], PX, FACTOR_X, PIXEL_ALIGN)
                labels = load_labels(
                    target, target_strides, y + row, from_x, masks, ignore_index, CLASSES, PX, PIXEL_ALIGN
                )
                raw = load_pixels(lse, lse_strides, y + row, from_x, masks, PX, PIXEL_ALIGN)
                if PER_PIXEL:
                    grads = load_pixels(grad_loss, grad_loss_strides, y + row, from_x, masks, PX, PIXEL_ALIGN)
                log_totals = ()
                smooth = ()
                hots = ()
                scales = ()
                here = ()
                near = tl.zeros([BLOCK], tl.int32)
                for d in tl.static_range(PX):
                    valid = labels[d] >= 0
                    # A pixel without a label has probabilities of zero, and its label matches no class.
                    log_totals += (tl.where(valid, raw[d] * LOG2E, float("inf")),)
                    hot = tl.where(valid, 1.0, 0.0).to(ACC)
                    if PER_PIXEL:
                        hot *= grads[d]
                    smooth += (hot * (SMOOTHING / CLASSES),)
                    hot *= 1.0 - SMOOTHING
                    if class_weight is not None:
                        hot *= tl.load(class_weight + tl.maximum(labels[d], 0))
                    hots += (hot,)
                    scales += (hot + smooth[d] * total_weight,)
                    label = labels[d] - first.to(tl.int32)
                    here += (label,)
                    near |= ((label >= 0) & (label < CLASS_BLOCK)).to(tl.int32)
                sums, rights = _add_probabilities(
                    sums, rights, values, down, columns, log_totals, scales, CLASS_BLOCK, PX, WEIGHTED
                )
                # Most rows of 32 cells have no label in most blocks of classes.
                if tl.max(near, 0) > 0:
                    sums, rights = _subtract_labels(
                        sums, rights, columns, here, hots, CLASS_BLOCK, PX, WEIGHTED or SMOOTHING != 0.0
                    )
                if SMOOTHING != 0.0:
                    sums, rights = _subtract_smooth(
                        sums, rights, columns, smooth, class_weight, first, CLASS_BLOCK, CLASSES, PX
                    )
            upper, lower = _spread(upper, lower, sums, rights, down, lane, CLASS_BLOCK)
        if k > 0:
            grads = ()
            for n in tl.static_range(CLASS_BLOCK):
                grads += (upper[n] * factor,)
            _store_classes(
                grad_plane, grad_logits_strides, i, j, grads, first,
                alive & (lane > 0) & (j >= 0) & (i < size[0]), CLASS_BLOCK, CLASSES, TILE, ALIGN,
            )  # fmt: skip
        i += 1


@triton.jit
def _edge_weights(
    x, j, size, full, PX: tl.constexpr, FACTOR: tl.constexpr, CORNERS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Column weights; a cell at the border gives everything to its one column of source pixels."""
    weights = weights_along(x, j, size, full, PX, FACTOR, CORNERS, ACC)
    columns = ()
    for d in tl.static_range(PX):
        # A sum, for the number to be of type ACC.
        t = tl.where(j < 0, 1.0, tl.where(j >= size - 1, 0.0, tl.zeros(j.shape, ACC) + weights[d]))
        columns += (t,)
    return columns


@triton.jit
def _add_probabilities(
    sums, rights, values, down, columns, log_totals, scales,
    COUNT: tl.constexpr, PX: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Adds the probabilities of a row of a cell, and what of them belongs to the right column."""
    new_sums = ()
    new_rights = ()
    for n in tl.static_range(COUNT):
        left = values[0][n] + down * values[2][n]
        across = values[1][n] + down * values[3][n] - left
        sum_ = sums[n]
        right = rights[n]
        for d in tl.static_range(PX):
            exponent = (left + columns[d] * across) * LOG2E - log_totals[d]
            # At most 0, however coarsely a huge lse is rounded.
            p = tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
            if WEIGHTED:
                p *= scales[d]
            sum_ += p
            right += columns[d] * p
        new_sums += (sum_,)
        new_rights += (right,)
    return new_sums, new_rights


@triton.jit
def _subtract_labels(
    sums, rights, columns, labels, hots, COUNT: tl.constexpr, PX: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    new_sums = ()
    new_rights = ()
    for n in tl.static_range(COUNT):
        sum_ = sums[n]
        right = rights[n]
        for d in tl.static_range(PX):
            if WEIGHTED:
                sum_ -= tl.where(labels[d] == n, hots[d], 0.0)
                right -= tl.where(labels[d] == n, hots[d] * columns[d], 0.0)
            else:
                sum_ = tl.where(labels[d] == n, sum_ - 1.0, sum_)
                right = tl.where(labels[d] == n, right - columns[d], right)
        new_sums += (sum_,)
        new_rights += (right,)
    return new_sums, new_rights


@triton.jit
def _subtract_smooth(
    sums, rights, columns, grads, class_weight, first, COUNT: tl.constexpr, CLASSES: tl.constexpr, PX: tl.constexpr
):  # fmt: skip
    """The classes share what label smoothing takes off, but for their weights."""
    sum_ = grads[0]
    right = grads[0] * columns[0]
    for d in tl.static_range(1, PX):
        sum_ += grads[d]
        right += grads[d] * columns[d]
    new_sums = ()
    new_rights = ()
    for n in tl.static_range(COUNT):
        if class_weight is not None:
            w = tl.load(class_weight + tl.minimum(first + n, CLASSES - 1))
            new_sums += (sums[n] - w * sum_,)
            new_rights += (rights[n] - w * right,)
        else:
            new_sums += (sums[n] - sum_,)
            new_rights += (rights[n] - right,)
    return new_sums, new_rights


@triton.jit
def _spread(upper, lower, sums, rights, down, lane, COUNT: tl.constexpr):
    """Adds a row to the source rows above and below it, its right column to the next lane."""
    up = 1.0 - down
    new_upper = ()
    new_lower = ()
    for n in tl.static_range(COUNT):
        value = sums[n] - rights[n] + tl.gather(rights[n], tl.maximum(lane - 1, 0), 0)
        new_upper += (upper[n] + up * value,)
        new_lower += (lower[n] + down * value,)
    return new_upper, new_lower


@triton.jit
def _store_classes(
    plane, strides, i, j, values, first, mask,
    COUNT: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    offset = tl.multiple_of(i * strides[2] + j * strides[3], ALIGN)
    if TILE:
        n = tl.arange(0, TILE)
        pointers = plane + (offset[:, None] + ((first + n).to(offset.dtype) * strides[1])[None, :])
        mask = mask[:, None] & ((n < COUNT) & (first + n < CLASSES))[None, :]
        tl.store(pointers, bind(values, COUNT, TILE).to(plane.dtype.element_ty), mask=mask)
    else:
        for n in tl.static_range(COUNT):
            pointers = plane + (first + n) * strides[1] + offset
            tl.store(pointers, values[n].to(plane.dtype.element_ty), mask=mask & (first + n < CLASSES))


def forward(
    loss: Tensor,
    count: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Writes loss [N, H, W], or their sum where 0-d, count (0-d) and lse [N, H, W]; labels are not checked."""
    if not target.numel():
        loss.zero_()
        count.zero_()
        return
    launch = _plan_forward(loss, lse, logits, target, class_weight, align_corners, ignore_index, label_smoothing)
    launch.run()
    torch.sum(launch.args["count"], 0, out=count)
    if not loss.ndim:
        torch.sum(launch.args["loss"], 0, out=loss)


def backward(
    grad_logits: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Writes the gradient of logits; ``grad_loss`` is [N, H, W] or 0-d."""
    if grad_logits.numel():
        settings = (align_corners, ignore_index, label_smoothing)
        _plan_backward(grad_logits, grad_loss, logits, target, class_weight, lse, *settings).run()


def _plan_forward(
    loss: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
) -> Launch:
    n, classes, *size = logits.shape
    full = target.shape[1:]
    geometry = bilinear.geometry(size, full, align_corners)
    tiled = bilinear.classes_together(logits)
    parts, config = bilinear.lane_pixels(size, full, align_corners)
    num_warps = 1 if tiled else 4
    block = 32 * num_warps
    blocks = triton.cdiv(parts[0] * parts[1] * geometry["cells"][0] * geometry["cells"][1], block)
    maps = (lse, target, loss) if loss.ndim else (lse, target)
    args: dict[str, Any] = {
        "loss": loss if loss.ndim else lse.new_empty(n * blocks),
        "count": lse.new_empty(n * blocks),
        "lse": lse,
        "logits": logits,
        "target": target,
        "class_weight": class_weight,
        "weight_sum": _weight_sum(class_weight, label_smoothing),
        "loss_strides": loss.stride() if loss.ndim else (0, 0, 0),
        "lse_strides": lse.stride(),
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "parts": parts,
        "blocks": blocks,
        "ignore_index": ignore_index,
        "CLASSES": classes,
        "SMOOTHING": label_smoothing,
        "PER_PIXEL": loss.ndim > 0,
        "CLASS_BLOCK": bilinear.class_block(classes, tiled),
        "TILED": tiled,
        "ALIGN": bilinear.class_alignment(logits),
        "PIXEL_ALIGN": bilinear.pixel_alignment(config["PX"], geometry["FACTOR_X"], *maps),
        "BLOCK": block,
        "WIDE": bilinear.is_wide(size, full, logits, *maps),
        "ACC": bilinear.accumulator(logits.dtype),
    }
    return Launch(_forward, (n * blocks,), args | geometry | config, num_warps)


def _plan_backward(
    grad_logits: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
) -> Launch:
    n, classes, *size = logits.shape
    full = target.shape[1:]
    geometry = bilinear.geometry(size, full, align_corners)
    _, cells = geometry["cells"]
    strip = triton.cdiv(size[0], triton.cdiv(size[0], 8))
    strips = triton.cdiv(size[0], strip)
    longest = bilinear.cells(size[1], full[1], align_corners)[1]
    parts = triton.cdiv(longest, 9)
    # As many classes as registers hold; unequal cells have more positions and weights of their own.
    class_block = triton.cdiv(classes, triton.cdiv(classes, 8 if geometry["FACTOR_X"] else 6))
    blocks = triton.cdiv(strips * cells, 31)
    px = triton.cdiv(longest, parts)
    maps = (lse, target, grad_loss) if grad_loss.ndim else (lse, target)
    args: dict[str, Any] = {
        "grad_logits": grad_logits,
        "grad_loss": grad_loss,
        "logits": logits,
        "target": target,
        "class_weight": class_weight,
        "weight_sum": _weight_sum(class_weight, label_smoothing),
        "lse": lse,
        "grad_logits_strides": grad_logits.stride(),
        "grad_loss_strides": grad_loss.stride() if grad_loss.ndim else (0, 0, 0),
        "logits_strides": logits.stride(),
        "target_strides": target.stride(),
        "lse_strides": lse.stride(),
        "strips": strips,
        "blocks": blocks,
        "ignore_index": ignore_index,
        "CLASSES": classes,
        "SMOOTHING": label_smoothing,
        "PER_PIXEL": grad_loss.ndim > 0,
        "PARTS": parts,
        "PX": px,
        "STRIP": strip,
        "CLASS_BLOCK": class_block,
        "TILE": triton.next_power_of_2(class_block) if bilinear.classes_together(logits) else 0,
        "ALIGN": bilinear.class_alignment(logits, grad_logits),
        "PIXEL_ALIGN": bilinear.pixel_alignment(px, geometry["FACTOR_X"], *maps),
        "BLOCK": 32,
        "WIDE": bilinear.is_wide(size, full, grad_logits, logits, *maps),
        "ACC": bilinear.accumulator(logits.dtype),
    }
    programs = n * blocks * triton.cdiv(classes, class_block)
    return Launch(_backward, (programs,), args | geometry | {"cells": cells}, num_warps=1)


def _weight_sum(class_weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return class_weight.sum() if class_weight is not None and label_smoothing else None


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named upsample_cross_entropy/kernel/dtype/layout/factor/corner convention."""
    # Each takes a compiler ten seconds or more.
    settings = [("bf16", "nchw", 4, False), ("fp16", "channels_last", 4, False)]
    settings += [("bf16", "nchw", 4, True), ("fp32", "nchw", 8, False)]
    cases = []
    for dtype, layout, factor, corners in settings:
        logits, full = bilinear.aot_logits(dtype, layout, factor)
        acc = torch.float64 if dtype == "fp64" else torch.float32
        target = torch.empty(full, dtype=torch.uint8, device="meta")
        lse = torch.empty(full, dtype=acc, device="meta")
        loss = torch.empty((), dtype=acc, device="meta")
        name = f"{dtype}/{layout}/x{factor}/{'corners' if corners else 'half_pixel'}"
        rest = (corners, 255, 0.0)
        launch = _plan_forward(loss, lse, logits, target, None, *rest)
        cases.append((f"upsample_cross_entropy/forward/{name}", launch))
        launch = _plan_backward(logits, loss, logits, target, None, lse, *rest)
        cases.append((f"upsample_cross_entropy/backward/{name}", launch))
    return cases
