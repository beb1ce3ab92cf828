"""Sums of features by class in Triton: S_k = sum of x_p over the pixels p of class k; backward dx_p = dS_{y_p}.

Layout: features [N, C, h, w] and labels [N, h, w], any strides; sums [K, C] or [N, K, C], contiguous.

A program sums some channels over some stretches of pixels, by the product of one-hot rows, which it makes in registers,
with its features; where a sum is not finite, which then holds for every class, again without a product. Programs' sums
are added in order: of as many parts as leave them small beside the features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import dot
from ._launch import Launch
from ._pixels import classes_of, flat, offsets, wide

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _load(
    x, labels, x_strides, label_strides, image, pixel, c, pixels, width, ignore_index, K: tl.constexpr,
    C: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Channels c of the pixels that count, else 0: [pixels, channels]; and the pixels' classes."""
    label = classes_of(labels, label_strides, image, pixel, pixel < pixels, width, ignore_index, K, WIDE)
    rows = offsets(x_strides, image, pixel, width, FLAT, WIDE)
    columns = (c.to(tl.int64) if WIDE else c) * x_strides[1]
    mask = (label >= 0)[:, None] & (c < C)[None, :]
    return tl.load(x + rows[:, None] + columns[None, :], mask=mask, other=0.0), label


@triton.jit
def _forward(
    sums, counts, x, labels, x_strides, label_strides, pixels, width, stretches, units, parts, channel_blocks,
    class_blocks, ignore_index,
    K: tl.constexpr, C: tl.constexpr, STRETCH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """sums [groups, parts, K, C] and counts [groups, parts, K], of a group's ``units``: stretches of its images."""
    program = tl.program_id(0)
    channel_block = program % channel_blocks
    class_block = program // channel_blocks % class_blocks
    row = program // channel_blocks // class_blocks
    group = row // parts
    begin = group * units + row % parts * units // parts
    end = group * units + (row % parts + 1) * units // parts
    k = class_block * BLOCK_K + tl.arange(0, BLOCK_K)
    c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    number = tl.zeros([BLOCK_K], tl.int32)
    for unit in range(begin, end):
        for first in range(0, STRETCH, BLOCK_P):
            pixel = unit % stretches * STRETCH + first + tl.arange(0, BLOCK_P)
            tile, label = _load(
                x, labels, x_strides, label_strides, unit // stretches, pixel, c, pixels, width, ignore_index, K, C,
                FLAT, WIDE,
            )  # fmt: skip
            hot = label[None, :] == k[:, None]
            acc = dot(hot.to(tl.float32).to(tile.dtype), tile, acc, INTERPRET)
            number += tl.sum(hot.to(tl.int32), 1)
    if tl.max(tl.max((acc - acc != 0).to(tl.int32), 1), 0) > 0:
        acc = tl.zeros([BLOCK_K, BLOCK_C], ACC)
        for unit in range(begin, end):
            for first in range(0, STRETCH):
                pixel = unit % stretches * STRETCH + first + tl.arange(0, 1)
                tile, label = _load(
                    x, labels, x_strides, label_strides, unit // stretches, pixel, c, pixels, width, ignore_index, K,
                    C, FLAT, WIDE,
                )  # fmt: skip
                acc += tl.where(label[None, :] == k[:, None], tile.to(ACC), 0.0)
    to = row.to(tl.int64) * K + k
    tl.store(sums + to[:, None] * C + c[None, :], acc, mask=(k < K)[:, None] & (c < C)[None, :])
    tl.store(counts + to, number.to(tl.int64), mask=(k < K) & (channel_block == 0))


@triton.jit
def _backward(
    grad_x, grad_sums, labels, x_strides, label_strides, pixels, width, tiles, channel_blocks, ignore_index, grad_step,
    K: tl.constexpr, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = program // channel_blocks // tiles
    pixel = program // channel_blocks % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = pixel < pixels
    label = classes_of(labels, label_strides, image, pixel, inside, width, ignore_index, K, WIDE)
    channel = (c < C)[None, :]
    at = grad_sums + image * grad_step + label[:, None] * C + c[None, :]
    value = tl.load(at, mask=(label >= 0)[:, None] & channel, other=0.0)
    rows = offsets(x_strides, image, pixel, width, FLAT, WIDE)
    columns = (c.to(tl.int64) if WIDE else c) * x_strides[1]
    tl.store(
        grad_x + rows[:, None] + columns[None, :], value.to(grad_x.dtype.element_ty), mask=inside[:, None] & channel
    )


def forward(sums: Tensor, counts: Tensor, features: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Writes sums and counts; labels are not checked."""
    if not features.numel():
        sums.zero_()
        counts.zero_()
        return
    launch = _plan_forward(sums, features, labels, ignore_index)
    launch.run()
    torch.sum(launch.args["sums"], 1, out=sums if sums.dim() == 3 else sums[None])
    torch.sum(launch.args["counts"], 1, out=counts if sums.dim() == 3 else counts[None])


def backward(grad_features: Tensor, grad_sums: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Writes grad_features."""
    if grad_features.numel():
        _plan_backward(grad_features, grad_sums, labels, ignore_index).run()


def _plan_forward(sums: Tensor, features: Tensor, labels: Tensor, ignore_index: int) -> Launch:
    n, c, height, width = features.shape
    classes = sums.shape[-2]
    small = features.dtype == torch.float64
    block_k = min(max(triton.next_power_of_2(classes), 16), 16 if small else 256)
    block_c = min(max(triton.next_power_of_2(c), 16), 16 if small else 64)
    stretch = min(1024, max(triton.next_power_of_2(height * width), 16))
    stretches = triton.cdiv(height * width, stretch)
    groups, units = (n, stretches) if sums.dim() == 3 else (1, n * stretches)
    small_beside = features.numel() * features.element_size() // 16
    parts = max(1, min(units, small_beside // (groups * classes * c * sums.element_size())))
    args: dict[str, Any] = {
        "sums": sums.new_empty(groups, parts, classes, c),
        "counts": sums.new_empty(groups, parts, classes, dtype=torch.int64),
        "x": features,
        "labels": labels,
        "x_strides": features.stride(),
        "label_strides": labels.stride(),
        "pixels": height * width,
        "width": width,
        "stretches": stretches,
        "units": units,
        "parts": parts,
        "channel_blocks": triton.cdiv(c, block_c),
        "class_blocks": triton.cdiv(classes, block_k),
        "ignore_index": ignore_index,
        "K": classes,
        "C": c,
        "STRETCH": stretch,
        "BLOCK_K": block_k,
        "BLOCK_P": min(16 if small else 32, stretch),
        "BLOCK_C": block_c,
        "FLAT": flat(features),
        "WIDE": wide(features, labels),
        "ACC": tl.float64 if small else tl.float32,
        "INTERPRET": triton.knobs.runtime.interpret,
    }
    programs = groups * parts * args["channel_blocks"] * args["class_blocks"]
    return Launch(_forward, (programs,), args, 8 if block_k > 64 else 4, 2)


def _plan_backward(grad_features: Tensor, grad_sums: Tensor, labels: Tensor, ignore_index: int) -> Launch:
    n, c, height, width = grad_features.shape
    block_c = min(max(triton.next_power_of_2(c), 16), 64)
    args: dict[str, Any] = {
        "grad_x": grad_features,
        "grad_sums": grad_sums,
        "labels": labels,
        "x_strides": grad_features.stride(),
        "label_strides": labels.stride(),
        "pixels": height * width,
        "width": width,
        "tiles": triton.cdiv(height * width, 64),
        "channel_blocks": triton.cdiv(c, block_c),
        "ignore_index": ignore_index,
        "grad_step": grad_sums.stride(0) if grad_sums.dim() == 3 else 0,
        "K": grad_sums.shape[-2],
        "C": c,
        "BLOCK_P": 64,
        "BLOCK_C": block_c,
        "FLAT": flat(grad_features),
        "WIDE": wide(grad_features, labels),
    }
    return Launch(_backward, (n * args["tiles"] * args["channel_blocks"],), args)


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named class_centers/kernel/dtype/layout/classes."""
    cases = []
    for dtype, name, layout, classes in (
        (torch.bfloat16, "bf16", "channels_last", 150),
        (torch.float16, "fp16", "contiguous", 60),
        (torch.float32, "fp32", "contiguous", 150),
        (torch.float64, "fp64", "contiguous", 60),
    ):
        features = torch.empty(8, 512, 64, 64, dtype=dtype, device="meta")
        if layout == "channels_last":
            features = features.to(memory_format=torch.channels_last)
        labels = torch.empty(8, 64, 64, dtype=torch.uint8, device="meta")
        sums = torch.empty(classes, 512, dtype=torch.promote_types(dtype, torch.float32), device="meta")
        ending = f"{name}/{layout}/k{classes}"
        cases.append((f"class_centers/forward/{ending}", _plan_forward(sums, features, labels, 255)))
        cases.append((f"class_centers/backward/{ending}", _plan_backward(features, sums, labels, 255)))
    return cases
