"""Labels from DUpsampling's logits in Triton; the logits never leave registers.

    z(p, c)  = (<weight(s, c), x(cell)> + bias(s, c)) / T           p = sub-pixel s = (dy, dx) of a cell
    label(p) = argmax_c z(p, c), the lowest of equals
    confidence(p) = 1 / sum_c exp(z(p, c) - max_c z(p, c))

Layout: x [N, C, h, w], weight [r * r * K, C], labels, confidence [N, H, W], any strides, r (h - 1) < H <= r h.

A program owns a block of cells and one dy, and walks dx.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dupsample import (
    LOG2E,
    LOWEST,
    aot_inputs,
    aot_names,
    cells,
    forward_configuration,
    geometry,
    load_rows,
    logits,
    offsets,
    pixel_offsets,
    scale_of,
)
from ._launch import Launch

__all__ = ["aot_cases", "forward"]

# What lifts the smallest difference of two logits above every class.
_LIFT = tl.constexpr(2.0**100)


@triton.jit
def _first_of(z, top, first):
    """The first class whose logit is ``top``, as a number. By products: comparisons run at half their rate."""
    classes = tl.arange(0, z.shape[1]).to(z.dtype)
    return first + tl.min((top[:, None] - z) * _LIFT + classes[None, :], 1).to(tl.int32)


@triton.jit
def _forward(
    labels, confidence, x, weight, bias, temperature,
    labels_strides, confidence_strides, x_strides, weight_strides, count, size, reciprocals, full_size,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, WIDTHS: tl.constexpr, FIRSTS: tl.constexpr, SPAN: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_W: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A pixel's results wait in registers for all dx, so that they are written in whole rows."""
    program = tl.program_id(0)
    dy = program % R
    image, i, j, inside = cells(program // R, count, size, reciprocals, BLOCK_M, WIDE)
    x_rows = offsets(x_strides, image, i, j, ALIGN)
    scale = scale_of(temperature, 1.0, ACC)
    tile = None
    if C <= BLOCK_C:
        tile = load_rows(x, x_rows, inside, 0, x_strides[1], C, BLOCK_C)

    column = tl.arange(0, BLOCK_R)
    all_labels = tl.zeros([BLOCK_M, BLOCK_R], tl.int32)
    all_confidence = tl.zeros([BLOCK_M, BLOCK_R], ACC)
    for dx in range(R):
        row = (dy * R + dx) * K
        top = tl.full([BLOCK_M], LOWEST, ACC)
        best = tl.zeros([BLOCK_M], tl.int32)
        exps = tl.zeros([BLOCK_M], ACC)
        for first in range(0, K, SPAN):
            for t in tl.static_range(len(WIDTHS)):
                z = logits(
                    tile, x, x_rows, inside, x_strides[1], weight, weight_strides, bias, row, first + FIRSTS[t], scale,
                    K, C, WIDTHS[t], BLOCK_C, ALIGN_W, WIDE, ACC, INTERPRET,
                )  # fmt: skip
                tile_top = tl.max(z, 1)
                best = tl.where(tile_top > top, _first_of(z, tile_top, first + FIRSTS[t]), best)
                new_top = tl.maximum(top, tile_top)
                if confidence is not None:
                    exps *= tl.exp2((top - new_top) * LOG2E)
                    exps += tl.sum(tl.exp2((z - new_top[:, None]) * LOG2E), 1)
                top = new_top
        all_labels = tl.where(column[None, :] == dx, best[:, None], all_labels)
        if confidence is not None:
            all_confidence = tl.where(column[None, :] == dx, (1.0 / exps)[:, None], all_confidence)

    y = i * R + dy
    mask = (inside & (y < full_size[0]))[:, None] & (column < R)[None, :]
    mask &= (j * R)[:, None] + column[None, :] < full_size[1]
    at = pixel_offsets(labels_strides, image, y, j * R)[:, None] + (column.to(y.dtype) * labels_strides[2])[None, :]
    tl.store(labels + at, all_labels.to(labels.dtype.element_ty), mask=mask)
    if confidence is not None:
        at = pixel_offsets(confidence_strides, image, y, j * R)[:, None]
        at += (column.to(y.dtype) * confidence_strides[2])[None, :]
        tl.store(confidence + at, all_confidence, mask=mask)


def forward(
    labels: Tensor,
    confidence: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    scale_factor: int,
) -> None:
    """Writes labels [N, H, W], and confidence unless it is [0]."""
    if labels.numel():
        _plan(labels, confidence, x, weight, bias, temperature, scale_factor).run()


def _plan(labels, confidence, x, weight, bias, temperature, scale_factor) -> Launch:
    config = forward_configuration(x.shape[1], weight.shape[0] // scale_factor**2, x.element_size())
    num_warps, num_stages = config.pop("num_warps"), config.pop("num_stages")
    wanted = confidence.dim() == 3
    pixels = [labels, confidence] if wanted else [labels]
    args = geometry(x, weight, scale_factor, pixels, config.pop("BLOCK_M")) | config
    args |= {
        "labels": labels,
        "confidence": confidence if wanted else None,
        "bias": bias,
        "temperature": temperature,
        "labels_strides": labels.stride(),
        "confidence_strides": confidence.stride() if wanted else (0, 0, 0),
        "BLOCK_R": triton.next_power_of_2(scale_factor),
    }
    programs = triton.cdiv(args["count"], args["BLOCK_M"]) * scale_factor
    return Launch(_forward, (programs,), args, num_warps, num_stages)


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named dupsample_argmax/output/dtype/layout/channels/classes."""
    cases = []
    for dtype, kind, channels, classes in aot_names():
        t = aot_inputs(dtype, kind, channels, classes)
        outputs: dict[str, Any] = {"labels": torch.empty(0, device="meta")}
        if (channels, kind) == (64, "channels_last"):
            outputs["confidence"] = t["map"]
        for output, confidence in outputs.items():
            launch = _plan(t["target"], confidence, t["x"], t["weight"], t["bias"], t["temperature"], 16)
            cases.append((f"dupsample_argmax/{output}/{dtype}/{kind}/c{channels}/k{classes}", launch))
    return cases
