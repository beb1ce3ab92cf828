"""What the DUpsampling kernels share: cells of the low-resolution map, their logits, sums over programs.

A program owns a block of cells (n, i, j) of the low-resolution map, of all images in a row. Sub-pixel (dy, dx) of cell
(i, j) is pixel (r * i + dy, r * j + dx), and its K logits are rows (dy * r + dx) * K ... of the weight times the cell.
They stand in registers as several tiles whose widths are powers of two and add up to K, or little more: 21 = 16 + 8,
150 = 128 + 16 + 8. Where one span of tiles does not hold all classes, a program goes through several.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import dot
from ._launch import Launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A finite start of a running maximum.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def _quotient(n, divisor, reciprocal, WIDE: tl.constexpr):
    """n // divisor; below 2^31 the product of 2 n with ``reciprocal``'s first, shifted right by 32 and its second."""
    if WIDE:
        return n // divisor
    else:
        return (tl.umulhi(n.to(tl.uint32) * 2, reciprocal[0].to(tl.uint32)) >> reciprocal[1]).to(tl.int32)


@triton.jit
def cells(block, count, size, reciprocals, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Image, row and column of a block's cells, and the mask of those that exist; WIDE makes every offset 64-bit."""
    cell = tl.zeros([BLOCK], tl.int64 if WIDE else tl.int32) + block
    cell = cell * BLOCK + tl.arange(0, BLOCK)
    line = _quotient(cell, size[1], reciprocals[1], WIDE)
    image = _quotient(line, size[0], reciprocals[0], WIDE)
    return image, line - image * size[0], cell - line * size[1], cell < count


@triton.jit
def offsets(strides, image, y, x, ALIGN: tl.constexpr):
    """Offsets of cells in a tensor [N, channels, h, w]: multiples of ALIGN; if negative, of as many neighbours each."""
    at = image * strides[0] + y * strides[2] + x * strides[3]
    if ALIGN < 0:
        return tl.multiple_of(tl.max_contiguous(at, at.shape[0]), -ALIGN)
    else:
        return tl.multiple_of(at, ALIGN)


@triton.jit
def pixel_offsets(strides, image, y, x):
    """Offset of pixels in a tensor [N, H, W]."""
    return image * strides[0] + y * strides[1] + x * strides[2]


@triton.jit
def load_rows(tensor, rows, inside, first, stride, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels first .. first + BLOCK_C of every row, zero where there is none."""
    channel = first + tl.arange(0, BLOCK_C)
    pointers = tensor + rows[:, None] + (channel.to(rows.dtype) * stride)[None, :]
    mask = inside[:, None]
    if C % BLOCK_C:
        mask = mask & (channel < C)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def weight_rows(strides, row, first, K: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the weight's rows of classes first .. first + WIDTH of a sub-pixel, and the mask of those below K."""
    column = first + tl.arange(0, WIDTH)
    rows = row + column
    if WIDE:
        rows = rows.to(tl.int64)
    return tl.multiple_of(rows * strides[0], ALIGN), column < K


@triton.jit
def products(
    tile, x, rows, inside, x_stride, weight, w_rows, w_inside, w_stride,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """<x(cell), weight(row)> [cells, rows]; ``tile`` is x's where one block holds all channels."""
    acc = tl.zeros([rows.shape[0], w_rows.shape[0]], ACC)
    if C <= BLOCK_C:
        acc = dot(tile, tl.trans(load_rows(weight, w_rows, w_inside, 0, w_stride, C, BLOCK_C)), acc, INTERPRET)
    else:
        for first in range(0, C, BLOCK_C):
            a = load_rows(x, rows, inside, first, x_stride, C, BLOCK_C)
            b = load_rows(weight, w_rows, w_inside, first, w_stride, C, BLOCK_C)
            acc = dot(a, tl.trans(b), acc, INTERPRET)
    return acc


@triton.jit
def scaled(acc, bias, row, first, scale, K: tl.constexpr, WIDTH: tl.constexpr):
    """(acc + bias) * scale, -inf beyond the last class."""
    column = first + tl.arange(0, WIDTH)
    offset = tl.zeros([WIDTH], acc.dtype)
    if bias is not None:
        offset += tl.load(bias + row + column, mask=column < K, other=0.0).to(acc.dtype) * scale
    if K % WIDTH:
        offset = tl.where(column < K, offset, -float("inf"))
    return acc * scale + offset[None, :]


@triton.jit
def logits(
    tile, x, rows, inside, x_stride, weight, w_strides, bias, row, first, scale,
    K: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """scale * z [cells, WIDTH] for classes first .. of the sub-pixel whose rows of the weight begin at ``row``."""
    w_rows, w_inside = weight_rows(w_strides, row, first, K, WIDTH, ALIGN, WIDE)
    acc = products(tile, x, rows, inside, x_stride, weight, w_rows, w_inside, w_strides[1], C, BLOCK_C, ACC, INTERPRET)
    return scaled(acc, bias, row, first, scale, K, WIDTH)


@triton.jit
def log2(x):
    """log2 of x >= 1; for float32 by one step from the exponent, a third of the instructions of NVIDIA's own."""
    if x.dtype == tl.float64:
        return tl.log2(x)
    else:
        # Off by less than 0.044: a logarithm that is linear between powers of two.
        near = x.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - 126.957
        r = x * tl.exp2(-near) - 1.0
        return near + r * (LOG2E + r * (-0.5 * LOG2E + r * (LOG2E / 3 + r * (-0.25 * LOG2E + r * (0.2 * LOG2E)))))


@triton.jit
def scale_of(temperature, factor, ACC: tl.constexpr):
    """factor / temperature."""
    scale = tl.full([], factor, ACC)
    if temperature is not None:
        scale /= tl.load(temperature).to(ACC)
    return scale


@triton.jit
def _total(out, second, parts, count, temperature, unit, BLOCK: tl.constexpr):
    """Sum of ``count`` parts, in order, and of the next ``count``; of a temperature's gradient times -unit / T^2."""
    program = tl.program_id(0)
    acc = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        acc += tl.load(parts + program * count + i, mask=i < count, other=0.0).to(tl.float64)
    value = tl.sum(acc, 0)
    if temperature is not None:
        t = tl.load(temperature).to(tl.float64)
        value = -value / (t * t)
        if unit is not None:
            value *= tl.load(unit).to(tl.float64)
    if second is None:
        tl.store(out, value.to(out.dtype.element_ty))
    else:
        tl.store(out, value.to(out.dtype.element_ty), mask=program == 0)
        tl.store(second, value.to(out.dtype.element_ty), mask=program == 1)


@triton.jit
def _sum_parts(out, parts, size, count, temperature, unit, BLOCK: tl.constexpr):
    """out = unit / temperature * sum of ``count`` parts of ``size`` elements, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    acc = tl.zeros([BLOCK], parts.dtype.element_ty)
    pointers = parts + i
    for _ in range(count):
        acc += tl.load(pointers, mask=mask, other=0.0)
        pointers += size
    acc *= scale_of(temperature, 1.0, parts.dtype.element_ty)
    if unit is not None:
        acc *= tl.load(unit)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=mask)


def widths(classes: int, least: int, most: int, longest: int) -> dict[str, Any]:
    """Widths of a span's tiles, where each begins, and the length of the span.

    Powers of two from ``least`` to ``most``, the widest first, that add up to the classes, or to less than ``least``
    more; one tile of ``most`` where that would be longer than ``longest``.
    """
    whole = triton.cdiv(classes, least) * least
    if whole > longest:
        return {"WIDTHS": (most,), "FIRSTS": (0,), "SPAN": most}
    rest = whole % most
    tiles = [most] * (whole // most) + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return {"WIDTHS": tuple(tiles), "FIRSTS": tuple(sum(tiles[:i]) for i in range(len(tiles))), "SPAN": whole}


def layout(x: Tensor) -> int:
    """ALIGN of ``offsets``, up to what 16 bytes hold; negative where all cells of an image are neighbours."""
    height, width = x.shape[2:]
    n, c, row, column = x.stride()
    most = 16 // x.element_size()
    flat = (width == 1 or column == 1) and (height == 1 or row == width) and height * width > 1
    if flat and (c != 1 or x.shape[1] == 1):
        return -math.gcd(most, height * width, n)
    return math.gcd(most, n, row, column)


def _reciprocal(divisor: int) -> tuple[int, int]:
    """For ``_quotient`` (Granlund and Montgomery, Division by invariant integers using multiplication)."""
    shift = (divisor - 1).bit_length()
    return (1 << 31 + shift) // divisor + 1, shift


def geometry(x: Tensor, weight: Tensor, scale_factor: int, pixels: list[Tensor], block_m: int) -> dict[str, Any]:
    """Arguments that all kernels share; ``pixels`` are the tensors [..., H, W]."""
    spans = (sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in (x, weight, *pixels))
    count = x.shape[0] * x.shape[2] * x.shape[3]
    return {
        "x": x,
        "weight": weight,
        "x_strides": x.stride(),
        "weight_strides": weight.stride(),
        "count": count,
        "size": tuple(x.shape[2:]),
        "reciprocals": tuple(_reciprocal(size) for size in x.shape[2:]),
        "full_size": tuple(pixels[0].shape[-2:]),
        "R": scale_factor,
        "K": weight.shape[0] // scale_factor**2,
        "C": x.shape[1],
        "BLOCK_M": block_m,
        "ALIGN": layout(x),
        "ALIGN_W": math.gcd(16 // weight.element_size(), weight.stride(0)),
        "WIDE": max(count + block_m, *spans) >= 2**31,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "INTERPRET": triton.knobs.runtime.interpret,
    }


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def total(out: Tensor, parts: Tensor, second: Tensor | None = None, *factors: Tensor | None) -> Launch:
    """``out`` and ``second`` from ``parts`` [1 or 2, count]; ``factors`` are temperature and unit."""
    temperature, unit = factors or (None, None)
    args: dict[str, Any] = {"out": out, "second": second, "parts": parts, "count": parts.shape[1]}
    args |= {"temperature": temperature, "unit": unit, "BLOCK": 1024}
    return Launch(_total, (parts.shape[0],), args)


def sum_parts(out: Tensor, parts: Tensor, temperature: Tensor | None, unit: Tensor | None = None) -> Launch:
    """``out`` from ``parts`` [count, *] with out's order of elements in memory."""
    args: dict[str, Any] = {"out": out, "parts": parts, "size": out.numel(), "count": parts.shape[0]}
    args |= {"temperature": temperature, "unit": unit, "BLOCK": 1024}
    return Launch(_sum_parts, (triton.cdiv(out.numel(), 1024),), args)


def half_configuration(channels: int, classes: int, block_m: int, most: int) -> dict[str, Any]:
    """Blocks of channels and classes in half precision, within the 64 KiB of shared memory that every GPU has.

    A program keeps all channels of its cells where they are up to 256, and all classes of a sub-pixel arrive at once,
    twice, where there is room; else 32 classes do.
    """
    block_c = max(triton.next_power_of_2(channels), 16)
    if block_c > 256:
        return {**widths(classes, 16, 32, 32), "BLOCK_C": 64}
    tiles = widths(classes, 16, most, 256)
    if 2 * block_c * (block_m + 2 * tiles["SPAN"]) > 64 << 10:
        tiles = widths(classes, 16, 32, 32)
    return {**tiles, "BLOCK_C": block_c}


def forward_configuration(channels: int, classes: int, itemsize: int) -> dict[str, Any]:
    """Blocks of cells, channels and classes, warps and stages of the kernels that hold all logits of a pixel."""
    if itemsize == 2:
        block_m = 128 if channels <= 128 else 64
        num_warps = 8 if classes > 64 else 4
        return {**half_configuration(channels, classes, block_m, 64), "BLOCK_M": block_m, "num_warps": num_warps,
                "num_stages": 3 if max(channels, classes) <= 64 else 2}  # fmt: skip
    if itemsize == 4:
        return {**widths(classes, 16, 32, 32), "BLOCK_M": 64, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
    return {**widths(classes, 16, 16, 16), "BLOCK_M": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1}


def parts_for(programs: int, steps: int, out: Tensor) -> int:
    """How many parts every program's walk is cut into: 4 programs for each of 132 multiprocessors, 16 MiB of sums."""
    dense = out.numel() == sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True)) + 1
    most = min(steps, (16 << 20) // (4 * out.numel())) if dense else 1
    return max(min(triton.cdiv(528, programs), most), 1)


def parts_of(tensor: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(
        (count, *tensor.shape), (tensor.numel(), *tensor.stride()), dtype=dtype, device=tensor.device
    )


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def aot_inputs(dtype: str, layout: str, channels: int, classes: int) -> dict[str, Any]:
    """Meta tensors of the measured shapes: 33 x 33 cells and 21 classes, 32 x 32 cells and 150 classes, r = 16."""
    side = 33 if classes == 21 else 32
    kind = DTYPES[dtype]
    kwargs: dict[str, Any] = {"device": "meta"}
    sums = torch.float64 if dtype == "fp64" else torch.float32
    return {
        "x": torch.empty(8, channels, side, side, dtype=kind, **kwargs).to(memory_format=LAYOUTS[layout]),
        "weight": torch.empty(256 * classes, channels, dtype=kind, **kwargs),
        "bias": torch.empty(256 * classes, dtype=kind, **kwargs),
        "temperature": torch.empty(1, dtype=sums, **kwargs),
        "target": torch.empty(8, 16 * side, 16 * side, dtype=torch.uint8, **kwargs),
        "map": torch.empty(8, 16 * side, 16 * side, dtype=sums, **kwargs),
        "scalar": torch.empty((), dtype=sums, **kwargs),
    }


def aot_names() -> list[tuple[str, str, int, int]]:
    """(dtype, layout, channels, classes) of the shipped configurations."""
    names = [(dtype, "channels_last", 64, 21) for dtype in DTYPES]
    names += [(dtype, "channels_last", 64, 150) for dtype in ("bf16", "fp32")]
    return [*names, ("bf16", "channels_last", 256, 21), ("bf16", "nchw", 64, 21), ("bf16", "nchw", 256, 150)]
