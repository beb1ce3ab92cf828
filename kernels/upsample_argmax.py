"""Bilinear upsampling and argmax over classes in one pass, in Triton; of several maps, the mean of their softmaxes.

    one map:       label = argmax_c z_c                         confidence = 1 / sum_c exp(z_c - z_label)
    several maps:  label = argmax_c mean_m exp(z_mc - lse_m)    confidence = the mean at the label

Layout: logits [N, K, h, w] each, labels and confidence [N, H, W], any strides. The lowest of equal classes wins.

One map goes by cells (_bilinear.py) and needs exponentials only for the confidence. Several maps do not share cells: a
lane takes one output pixel, first the log-sum-exp of every map, then the classes again, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _bilinear as bilinear
from ._bilinear import (
    LOG2E,
    LOWEST,
    along_row,
    corner_offsets,
    lane_cells,
    load_corners,
    pixel_masks,
    source_cell,
    store_pixels,
    weights_along,
)
from ._dupsample import log2
from ._launch import Launch

__all__ = ["aot_cases", "forward"]


@triton.jit
def _absorb(
    best, label, total, plane, offsets, stride, first, rows, columns,
    COUNT: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    CONFIDENCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maximum, its class and, for the confidence, the sum of exp(z - maximum), of every output pixel."""
    values = load_corners(plane, offsets, stride, first, COUNT, CLASSES, TILE, ACC)
    new_best = ()
    new_label = ()
    new_total = ()
    for r in tl.static_range(PY):
        left, across = along_row(values, rows[r], COUNT)
        for d in tl.static_range(PX):
            highest = best[r * PX + d]
            at = label[r * PX + d]
            z = ()
            for n in tl.static_range(COUNT):
                value = left[n] + columns[d] * across[n]
                at = tl.where(value > highest, first + n, at)
                highest = tl.maximum(highest, value)
                z += (value,)
            if CONFIDENCE:
                sum_ = total[r * PX + d] * tl.exp2((best[r * PX + d] - highest) * LOG2E)
                for n in tl.static_range(COUNT):
                    sum_ += tl.exp2((z[n] - highest) * LOG2E)
                new_total += (sum_,)
            new_best += (highest,)
            new_label += (at,)
    return new_best, new_label, new_total


@triton.jit
def _one(
    labels, confidence, logits, labels_strides, confidence_strides, logits_strides, size, full, cells, parts, blocks,
    CLASSES: tl.constexpr, CORNERS: tl.constexpr, FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr, PY: tl.constexpr,
    PX: tl.constexpr, CLASS_BLOCK: tl.constexpr, TILED: tl.constexpr, ALIGN: tl.constexpr, PIXEL_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    CONFIDENCE: tl.constexpr = confidence is not None
    image = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    i, j, y, x, y_end, x_end, alive = lane_cells(
        lane, size, full, cells, parts, CORNERS, FACTOR_Y, FACTOR_X, PY, PX, WIDE
    )
    best = ()
    label = ()
    total = ()
    for _ in tl.static_range(PY * PX):
        best += (tl.full([BLOCK], -float("inf"), ACC),)
        label += (tl.zeros([BLOCK], tl.int32),)
        if CONFIDENCE:
            total += (tl.zeros([BLOCK], ACC),)
    rows = weights_along(y, i, size[0], full[0], PY, FACTOR_Y, CORNERS, ACC)
    columns = weights_along(x, j, size[1], full[1], PX, FACTOR_X, CORNERS, ACC)
    plane = logits + tl.multiple_of(image * logits_strides[0], ALIGN)
    offsets = corner_offsets(i, j, size, logits_strides, ALIGN)
    TAIL: tl.constexpr = CLASSES % CLASS_BLOCK
    whole = tl.where(tl.max(alive.to(tl.int32), 0) > 0, CLASSES - TAIL, 0)
    for first in range(0, whole, CLASS_BLOCK):
        best, label, total = _absorb(
            best, label, total, plane, offsets, logits_strides[1], first, rows, columns,
            CLASS_BLOCK, CLASSES, CLASS_BLOCK if TILED else 0, PY, PX, CONFIDENCE, ACC,
        )  # fmt: skip
    if TAIL:
        best, label, total = _absorb(
            best, label, total, plane, offsets, logits_strides[1], CLASSES - TAIL, rows, columns,
            TAIL, CLASSES, CLASS_BLOCK if TILED else 0, PY, PX, CONFIDENCE, ACC,
        )  # fmt: skip

    for r in tl.static_range(PY):
        row_label = ()
        row_confidence = ()
        for d in tl.static_range(PX):
            row_label += (label[r * PX + d],)
            if CONFIDENCE:
                row_confidence += (1.0 / total[r * PX + d],)
        masks = pixel_masks(x, alive & (y + r >= 0) & (y + r < y_end), x_end, full[1], PX, FACTOR_X, PIXEL_ALIGN)
        at = labels + image * labels_strides[0]
        store_pixels(at, labels_strides, y + r, x, row_label, masks, PX, PIXEL_ALIGN)
        if CONFIDENCE:
            at = confidence + image * confidence_strides[0]
            store_pixels(at, confidence_strides, y + r, x, row_confidence, masks, PX, PIXEL_ALIGN)


@triton.jit
def _blend(
    plane, offsets, stride, first, down, across,
    COUNT: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """COUNT classes of one output pixel per lane, in units of log 2; those beyond CLASSES are -inf."""
    values = load_corners(plane, offsets, stride, first, COUNT, CLASSES, TILE, ACC)
    z = ()
    for n in tl.static_range(COUNT):
        left = values[0][n] + down * values[2][n]
        right = values[1][n] + down * values[3][n]
        blend = (left + across * (right - left)) * LOG2E
        z += (tl.where(first + n < CLASSES, blend, -float("inf")),)
    return z


@triton.jit
def _mean(
    labels, confidence, logits, labels_strides, confidence_strides, logits_strides, sizes, full, blocks,
    CLASSES: tl.constexpr, CORNERS: tl.constexpr, CLASS_BLOCK: tl.constexpr, TILES: tl.constexpr,
    ALIGNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`logits`, their strides and sizes are tuples, one entry per map."""
    MAPS: tl.constexpr = len(logits)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    y = lane // full[1]
    x = lane % full[1]
    alive = y < full[0]
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    planes = ()
    offsets = ()
    downs = ()
    acrosses = ()
    shifts = ()
    for m in tl.static_range(MAPS):
        i, down = source_cell(y, sizes[m][0], full[0], CORNERS, ACC)
        j, across = source_cell(x, sizes[m][1], full[1], CORNERS, ACC)
        plane = logits[m] + image * logits_strides[m][0]
        at = corner_offsets(i, j, sizes[m], logits_strides[m], ALIGNS[m])
        top = tl.full([BLOCK], LOWEST, ACC)
        total = tl.zeros([BLOCK], ACC)
        for first in range(0, CLASSES, CLASS_BLOCK):
            z = _blend(
                plane, at, logits_strides[m][1], first, down, across, CLASS_BLOCK, CLASSES, TILES[m], ACC
            )  # fmt: skip
            before = top
            for n in tl.static_range(CLASS_BLOCK):
                top = tl.maximum(top, z[n])
            total *= tl.exp2(before - top)
            for n in tl.static_range(CLASS_BLOCK):
                total += tl.exp2(z[n] - top)
        planes += (plane,)
        offsets += (at,)
        downs += (down,)
        acrosses += (across,)
        shifts += (top + log2(total),)

    best = tl.full([BLOCK], -1.0, ACC)
    label = tl.zeros([BLOCK], tl.int32)
    for first in range(0, CLASSES, CLASS_BLOCK):
        sums = ()
        for _ in tl.static_range(CLASS_BLOCK):
            sums += (tl.zeros([BLOCK], ACC),)
        for m in tl.static_range(MAPS):
            z = _blend(
                planes[m], offsets[m], logits_strides[m][1], first, downs[m], acrosses[m],
                CLASS_BLOCK, CLASSES, TILES[m], ACC,
            )  # fmt: skip
            more = ()
            for n in tl.static_range(CLASS_BLOCK):
                more += (sums[n] + tl.exp2(z[n] - shifts[m]),)
            sums = more
        for n in tl.static_range(CLASS_BLOCK):
            better = (sums[n] > best) & (first + n < CLASSES)
            label = tl.where(better, first + n, label)
            best = tl.where(better, sums[n], best)
    at = image * labels_strides[0] + y * labels_strides[1] + x * labels_strides[2]
    tl.store(labels + at, label.to(labels.dtype.element_ty), mask=alive)
    if confidence is not None:
        at = image * confidence_strides[0] + y * confidence_strides[1] + x * confidence_strides[2]
        tl.store(confidence + at, best / MAPS, mask=alive)


def forward(labels: Tensor, confidence: Tensor, logits: Sequence[Tensor], align_corners: bool) -> None:
    """Writes labels [N, H, W] and, unless it is of shape [0], confidence [N, H, W]."""
    if labels.numel():
        plan = _plan_one if len(logits) == 1 else _plan_mean
        plan(labels, confidence if confidence.ndim == 3 else None, logits, align_corners).run()


def _plan_one(labels: Tensor, confidence: Tensor | None, logits: Sequence[Tensor], align_corners: bool) -> Launch:
    (x,) = logits
    n, classes, *size = x.shape
    full = labels.shape[1:]
    geometry = bilinear.geometry(size, full, align_corners)
    tiled = bilinear.classes_together(x)
    parts, config = bilinear.lane_pixels(size, full, align_corners)
    num_warps = 1 if tiled else 4
    block = 32 * num_warps
    blocks = triton.cdiv(parts[0] * parts[1] * geometry["cells"][0] * geometry["cells"][1], block)
    maps = [labels] if confidence is None else [labels, confidence]
    args: dict[str, Any] = {
        "labels": labels,
        "confidence": confidence,
        "logits": x,
        "labels_strides": labels.stride(),
        "confidence_strides": (0, 0, 0) if confidence is None else confidence.stride(),
        "logits_strides": x.stride(),
        "parts": parts,
        "blocks": blocks,
        "CLASSES": classes,
        "CLASS_BLOCK": bilinear.class_block(classes, tiled),
        "TILED": tiled,
        "ALIGN": bilinear.class_alignment(x),
        "PIXEL_ALIGN": bilinear.pixel_alignment(config["PX"], geometry["FACTOR_X"], *maps),
        "BLOCK": block,
        "WIDE": bilinear.is_wide(size, full, x, *maps),
        "ACC": bilinear.accumulator(x.dtype),
    }
    return Launch(_one, (n * blocks,), args | geometry | config, num_warps)


def _plan_mean(labels: Tensor, confidence: Tensor | None, logits: Sequence[Tensor], align_corners: bool) -> Launch:
    n, height, width = labels.shape
    classes = logits[0].shape[1]
    class_block, num_warps = 8, 4
    blocks = triton.cdiv(height * width, 32 * num_warps)
    sizes = tuple(tuple(x.shape[2:]) for x in logits)
    wide = any(
        bilinear.is_wide(size, (height, width), x, labels, confidence) for x, size in zip(logits, sizes, strict=True)
    )
    args: dict[str, Any] = {
        "labels": labels,
        "confidence": confidence,
        "logits": tuple(logits),
        "labels_strides": labels.stride(),
        "confidence_strides": (0, 0, 0) if confidence is None else confidence.stride(),
        "logits_strides": tuple(x.stride() for x in logits),
        "sizes": sizes,
        "full": (height, width),
        "blocks": blocks,
        "CLASSES": classes,
        "CORNERS": align_corners,
        "CLASS_BLOCK": class_block,
        "TILES": tuple(class_block if bilinear.classes_together(x) else 0 for x in logits),
        "ALIGNS": tuple(bilinear.class_alignment(x) for x in logits),
        "BLOCK": 32 * num_warps,
        "WIDE": wide,
        "ACC": bilinear.accumulator(logits[0].dtype),
    }
    return Launch(_mean, (n * blocks,), args, num_warps)


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named upsample_argmax/kernel/dtype/layout/factor/corner convention."""
    settings = [("one", "bf16", "nchw", 4, False), ("one", "fp16", "channels_last", 8, False)]
    settings += [("one", "fp32", "nchw", 4, True)]
    settings += [(kernel, "bf16", "nchw", 4, False) for kernel in ("confidence", "mean")]
    cases = []
    for kernel, dtype, layout, factor, corners in settings:
        logits, full = bilinear.aot_logits(dtype, layout, factor)
        labels = torch.empty(full, dtype=torch.uint8, device="meta")
        acc = torch.float64 if dtype == "fp64" else torch.float32
        confidence = None if kernel == "one" else torch.empty(full, dtype=acc, device="meta")
        if kernel == "mean":
            launch = _plan_mean(labels, confidence, [logits, logits], corners)
        else:
            launch = _plan_one(labels, confidence, [logits], corners)
        name = f"{dtype}/{layout}/x{factor}/{'corners' if corners else 'half_pixel'}"
        cases.append((f"upsample_argmax/{kernel}/{name}", launch))
    return cases
