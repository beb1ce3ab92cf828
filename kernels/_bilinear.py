"""Bilinear interpolation by cells, shared by the kernels that never store their upsampled logits.

Along an axis, cell i is the output positions x whose source position lies in [i, i + 1): they blend source pixels i and
i + 1, clamped to the map, and start at begin(i). A lane takes the cell of one row and one column interval: it reads its
four corners once per class, and blends rows, then columns, for all its output pixels in registers:

    source(x) = (x + 1/2) * size / full - 1/2   or, with aligned corners, x * (size - 1) / (full - 1)
    z(x)      = (1 - t) * v(i) + t * v(i + 1)    t = source(x) - i

Positions are integers, exact at any size. Without aligned corners cell -1 holds the positions left of the first source
pixel. An integer FACTOR makes all cells alike: their weights are then constants and their positions have a known
alignment. Cells with more positions than a lane takes are cut into parts.

Everything per class is a tuple of vectors over lanes, never a tile, for a tile's layout would follow its load: in NCHW
a vector is read as such, with channels last a tile [lanes, classes] is, then goes through shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A finite start of the running maximum: with -inf the first rescale would be inf - inf.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def unbind(tile):
    """Columns of a tile [B, C], C a power of two up to 16, as a tuple of vectors."""
    parts = (tile,)
    for level in tl.static_range(4):
        if 1 << level < tile.shape[1]:
            even = ()
            odd = ()
            for i in tl.static_range(1 << level):
                a, b = tl.split(tl.reshape(parts[i], [tile.shape[0], tile.shape[1] // (2 << level), 2]))
                even += (a,)
                odd += (b,)
            parts = even + odd
    columns = ()
    for i in tl.static_range(tile.shape[1]):
        columns += (tl.reshape(parts[i], [tile.shape[0]]),)
    return columns


@triton.jit
def bind(columns, COUNT: tl.constexpr, C: tl.constexpr):
    """Tile [B, C] of the first COUNT vectors; C is a power of two up to 16, the columns beyond COUNT are anything."""
    B: tl.constexpr = columns[0].shape[0]
    parts = ()
    for i in tl.static_range(C):
        parts += (tl.reshape(columns[i if i < COUNT else COUNT - 1], [B, 1]),)
    for level in tl.static_range(4):
        if 1 << level < C:
            joined = ()
            for i in tl.static_range(C >> (level + 1)):
                pair = tl.join(parts[i], parts[i + (C >> (level + 1))])
                joined += (tl.reshape(pair, [B, 2 << level]),)
            parts = joined
    return parts[0]


@triton.jit
def begin(i, size, full, CORNERS: tl.constexpr, FACTOR: tl.constexpr):
    """First output position of cell i along an axis. A FACTOR's outer cells reach beyond the map."""
    if FACTOR > 0:
        return i * FACTOR + FACTOR // 2
    if CORNERS:
        last = tl.maximum(size - 1, 1)
        at = (i * tl.maximum(full - 1, 1) + last - 1) // last
    else:
        at = (full * (2 * i + 1) + size - 1) // (2 * size)
    return tl.where(i < 0, 0, tl.where(i >= size, full, at))


@triton.jit
def weight(x, i, size, full, CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Weight t of source pixel i + 1 at output position x, within [0, 1]."""
    if CORNERS:
        steps = tl.maximum(full - 1, 1)
        t = x * (size - 1) - i * steps
    else:
        steps = 2 * full
        t = (2 * x + 1) * size - full * (2 * i + 1)
    return tl.minimum(tl.maximum(t.to(ACC) / steps, 0.0), 1.0)


@triton.jit
def weights_along(
    x, i, size, full, COUNT: tl.constexpr, FACTOR: tl.constexpr, CORNERS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Weights at x .. x + COUNT of cell i; numbers where they are the same in every inner cell.

    In an outer cell both corners are the same pixel, so that the weights do not matter to a blend.
    """
    weights = ()
    for d in tl.static_range(COUNT):
        if FACTOR == COUNT:
            weights += ((2 * (FACTOR // 2 + d) + 1 - FACTOR) / (2 * FACTOR),)
        else:
            weights += (weight(x + d, i, size, full, CORNERS, ACC),)
    return weights


@triton.jit
def source_cell(x, size, full, CORNERS: tl.constexpr, ACC: tl.constexpr):
    """The cell of output position x, never an outer one, and the weight of its second pixel."""
    i = tl.maximum((2 * x + 1) * size - full, 0) // (2 * full)
    if CORNERS:
        i = x * (size - 1) // tl.maximum(full - 1, 1)
    return i, weight(x, i, size, full, CORNERS, ACC)


@triton.jit
def lane_cells(
    lane, size, full, cells, parts, CORNERS: tl.constexpr, FACTOR_Y: tl.constexpr, FACTOR_X: tl.constexpr,
    PY: tl.constexpr, PX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A lane's cell i, j, its first output position y, x, where its cell ends, and whether it has positions at all."""
    alive = lane < parts[0] * parts[1] * cells[0] * cells[1]
    j = lane % cells[1]
    lane = lane // cells[1]
    i = lane % cells[0]
    part = lane // cells[0]
    if not CORNERS:
        i -= 1
        j -= 1
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    y = begin(i, size[0], full[0], CORNERS, FACTOR_Y) + part // parts[1] * PY
    x = begin(j, size[1], full[1], CORNERS, FACTOR_X) + part % parts[1] * PX
    y_end = tl.minimum(begin(i + 1, size[0], full[0], CORNERS, FACTOR_Y), full[0])
    x_end = begin(j + 1, size[1], full[1], CORNERS, FACTOR_X)
    return i, j, y, x, y_end, x_end, alive & (y < y_end) & (x < x_end)


@triton.jit
def corner_offsets(i, j, size, strides, ALIGN: tl.constexpr):
    """Offsets within an image of rows i, i + 1 and columns j, j + 1 of the source, clamped to the map."""
    top = tl.minimum(tl.maximum(i, 0), size[0] - 1) * strides[2]
    bottom = tl.minimum(tl.maximum(i + 1, 0), size[0] - 1) * strides[2]
    left = tl.minimum(tl.maximum(j, 0), size[1] - 1) * strides[3]
    right = tl.minimum(tl.maximum(j + 1, 0), size[1] - 1) * strides[3]
    return (
        tl.multiple_of(top + left, ALIGN),
        tl.multiple_of(top + right, ALIGN),
        tl.multiple_of(bottom + left, ALIGN),
        tl.multiple_of(bottom + right, ALIGN),
    )


@triton.jit
def load_classes(
    plane, offset, stride, first,
    COUNT: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Classes first .. first + COUNT at every offset, a tuple of vectors; those beyond CLASSES are anything.

    TILE, a power of two >= COUNT, is the number of classes that are read together where classes are contiguous.
    """
    values = ()
    if TILE:
        c = first + tl.arange(0, TILE)
        pointers = plane + (offset[:, None] + (c.to(offset.dtype) * stride)[None, :])
        columns = unbind(tl.load(pointers, mask=(c < CLASSES)[None, :], other=0.0))
        for n in tl.static_range(COUNT):
            values += (columns[n].to(ACC),)
    else:
        for n in tl.static_range(COUNT):
            c = tl.minimum(first + n, CLASSES - 1).to(offset.dtype)
            values += (tl.load(plane + c * stride + offset).to(ACC),)
    return values


@triton.jit
def load_corners(
    plane, offsets, stride, first,
    COUNT: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of each class the two upper corners, and what is to be added to reach the lower ones."""
    top_left = load_classes(plane, offsets[0], stride, first, COUNT, CLASSES, TILE, ACC)
    top_right = load_classes(plane, offsets[1], stride, first, COUNT, CLASSES, TILE, ACC)
    bottom_left = load_classes(plane, offsets[2], stride, first, COUNT, CLASSES, TILE, ACC)
    bottom_right = load_classes(plane, offsets[3], stride, first, COUNT, CLASSES, TILE, ACC)
    down_left = ()
    down_right = ()
    for n in tl.static_range(COUNT):
        down_left += (bottom_left[n] - top_left[n],)
        down_right += (bottom_right[n] - top_right[n],)
    return top_left, top_right, down_left, down_right


@triton.jit
def along_row(corners, down, COUNT: tl.constexpr):
    """Of each class the left end of an output row, `down` of the way, and what is to be added to reach the right."""
    left = ()
    across = ()
    for n in tl.static_range(COUNT):
        a = corners[0][n] + down * corners[2][n]
        left += (a,)
        across += (corners[1][n] + down * corners[3][n] - a,)
    return left, across


@triton.jit
def pixel_masks(
    x, row, end, full, PX: tl.constexpr, FACTOR: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Which of the output positions x .. x + PX belong to the lane, ALIGN of them alike; `row` says if its row does."""
    masks = ()
    for d in tl.static_range(PX):
        at = x + d // ALIGN * ALIGN
        mask = row & (at >= 0) & (at < full)
        if FACTOR != PX:
            mask &= at < end
        masks += (mask,)
    return masks


@triton.jit
def _pixel_pointers(plane, strides, y, x, COUNT: tl.constexpr):
    at = tl.multiple_of(y * strides[1] + x * strides[2], COUNT)
    return plane + (at[:, None] + (tl.arange(0, COUNT).to(at.dtype) * strides[2])[None, :])


@triton.jit
def load_pixels(plane, strides, y, x, masks, PX: tl.constexpr, ALIGN: tl.constexpr):
    """Positions x .. x + PX of row y, a tuple of vectors, zero where masked; strides are those of [N, H, W]."""
    BITS: tl.constexpr = plane.dtype.element_ty.primitive_bitwidth
    COUNT: tl.constexpr = ALIGN if ALIGN * BITS <= 128 else 128 // BITS
    values = ()
    for d in tl.static_range(0, PX, COUNT):
        if COUNT == 1:
            pointers = plane + (y * strides[1] + (x + d) * strides[2])
            values += (tl.load(pointers, mask=masks[d], other=0),)
        else:
            pointers = _pixel_pointers(plane, strides, y, x + d, COUNT)
            values = values + unbind(tl.load(pointers, mask=masks[d][:, None], other=0))
    return values


@triton.jit
def store_pixels(plane, strides, y, x, values, masks, PX: tl.constexpr, ALIGN: tl.constexpr):
    """The inverse of load_pixels."""
    BITS: tl.constexpr = plane.dtype.element_ty.primitive_bitwidth
    COUNT: tl.constexpr = ALIGN if ALIGN * BITS <= 128 else 128 // BITS
    for d in tl.static_range(0, PX, COUNT):
        if COUNT == 1:
            pointers = plane + (y * strides[1] + (x + d) * strides[2])
            tl.store(pointers, values[d].to(plane.dtype.element_ty), mask=masks[d])
        else:
            chunk = ()
            for n in tl.static_range(COUNT):
                chunk += (values[d + n].to(plane.dtype.element_ty),)
            pointers = _pixel_pointers(plane, strides, y, x + d, COUNT)
            tl.store(pointers, bind(chunk, COUNT, COUNT), mask=masks[d][:, None])


@triton.jit
def valid_label(label, mask, ignore_index, CLASSES: tl.constexpr):
    """A label as int32, -1 where it is ignored, out of range or masked."""
    if label.dtype != tl.int64:
        label = label.to(tl.int32)
    mask &= (label >= 0) & (label < CLASSES) & (label != ignore_index)
    return tl.where(mask, label, -1).to(tl.int32)


@triton.jit
def load_labels(
    plane, strides, y, x, masks, ignore_index, CLASSES: tl.constexpr, PX: tl.constexpr, ALIGN: tl.constexpr
):
    raw = load_pixels(plane, strides, y, x, masks, PX, ALIGN)
    labels = ()
    for d in tl.static_range(PX):
        labels += (valid_label(raw[d], masks[d], ignore_index, CLASSES),)
    return labels


def cells(size: int, full: int, align_corners: bool) -> tuple[int, int, int]:
    """Of one axis: cells, output positions of the longest cell, FACTOR (0 where it is no integer)."""
    if align_corners:
        longest = full if size == 1 else triton.cdiv(max(full - 1, 1), size - 1)
        return size, longest, 0
    return size + 1, triton.cdiv(full, size), full // size if full % size == 0 else 0


def geometry(size: Sequence[int], full: Sequence[int], align_corners: bool) -> dict[str, Any]:
    """Arguments that every kernel over cells takes: sizes, cells per axis, and the factors."""
    rows, columns = (cells(a, b, align_corners) for a, b in zip(size, full, strict=True))
    return {
        "size": tuple(size),
        "full": tuple(full),
        "cells": (rows[0], columns[0]),
        "FACTOR_Y": rows[2],
        "FACTOR_X": columns[2],
        "CORNERS": align_corners,
    }


def lane_pixels(
    size: Sequence[int], full: Sequence[int], align_corners: bool
) -> tuple[tuple[int, int], dict[str, int]]:
    """Parts per cell along y and x, and the output pixels of a lane, PY x PX of up to 16.

    Along x a part of its own for a rare pixel too many would not stay empty for 32 lanes in a row; along y it does.
    """
    rows, columns = (cells(a, b, align_corners)[1] for a, b in zip(size, full, strict=True))
    parts_x = triton.cdiv(columns, 9)
    px = triton.cdiv(columns, parts_x)
    py = 1
    while 2 * py * px <= 16 and 2 * py * size[0] <= full[0]:
        py *= 2
    return (triton.cdiv(rows, py), parts_x), {"PY": py, "PX": px}


def pixel_alignment(px: int, factor: int, *tensors: Tensor) -> int:
    """In elements: what the first position of every lane is a multiple of, in maps [N, H, W], up to 16."""
    if not factor:
        return 1
    steps = [px, factor // 2 if factor > 1 else 1, *(x.stride(axis) for x in tensors for axis in (0, 1))]
    return math.gcd(16, *steps) if all(x.stride(2) == 1 for x in tensors) else 1


def class_alignment(*tensors: Tensor) -> int:
    """In elements: what every pixel's first class is a multiple of, up to a load of 16 bytes."""
    return math.gcd(16 // tensors[0].element_size(), *(x.stride(axis) for x in tensors for axis in (0, 2, 3)))


def classes_together(x: Tensor) -> bool:
    """Whether a pixel's classes, and not a row's pixels, lie side by side."""
    return x.stride(1) == 1 and x.stride(3) != 1


def class_block(classes: int, tiled: bool) -> int:
    """Classes that a lane takes at a time, forward: a power of two where they are read as a tile."""
    return triton.cdiv(classes, 2) if 16 < classes <= 20 and not tiled else 8


def is_wide(size: Sequence[int], full: Sequence[int], *tensors: Tensor | None) -> bool:
    """Whether an offset within one image, or a position in the units of ``weight``, needs 64 bits."""
    extents = [
        sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        for x in tensors
        if x is not None
    ]
    return max(*extents, *(4 * (a + 1) * (b + 1) for a, b in zip(size, full, strict=True))) >= 2**31


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def aot_logits(dtype: str, layout: str, factor: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Logits of a shipped configuration, on no device, and the shape of their labels."""
    shape = {4: (8, 150, 128, 128), 8: (8, 19, 128, 256)}[factor]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    logits = torch.empty(shape, dtype=DTYPES[dtype], device="meta").to(memory_format=memory_format)
    return logits, (shape[0], shape[2] * factor, shape[3] * factor)


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
