"""Confusion matrix of label maps in Triton: counts[t, p] = pixels of target t and prediction p.

Layout: prediction and target [N, H, W], any strides, counts int64 [K, K]. A pixel whose target is ignored or whose
target or prediction is outside [0, K) is not counted.

Labels come in runs: a lane takes 16 neighbouring pixels of a row and adds a run's length once, with an integer atomic,
whose order cannot matter. Programs spread over COPIES matrices, so that a map of one class does not queue at one word.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bilinear import load_labels
from ._launch import Launch

__all__ = ["aot_cases", "forward"]

_RUN = 16


@triton.jit
def _count(
    counts, prediction, target, prediction_strides, target_strides, height, width, runs, blocks, copies, ignore_index,
    CLASSES: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`counts` is [copies, CLASSES, CLASSES]."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    lane = program % blocks * BLOCK + tl.arange(0, BLOCK)
    y = lane // runs
    x = lane % runs * RUN
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    masks = ()
    for d in tl.static_range(RUN):
        masks += ((y < height) & (x + d // ALIGN * ALIGN < width),)
    target += image * target_strides[0]
    prediction += image * prediction_strides[0]
    rows = load_labels(target, target_strides, y, x, masks, ignore_index, CLASSES, RUN, ALIGN)
    columns = load_labels(prediction, prediction_strides, y, x, masks, -1, CLASSES, RUN, ALIGN)
    bins = ()
    for d in tl.static_range(RUN):
        bins += (tl.where((rows[d] >= 0) & (columns[d] >= 0), rows[d] * CLASSES + columns[d], -1),)
    counts += (program % copies).to(tl.int64) * (CLASSES * CLASSES)
    current = bins[0]
    length = tl.full([BLOCK], 1, tl.int64)
    for d in tl.static_range(1, RUN):
        ends = bins[d] != current
        tl.atomic_add(counts + current, length, mask=ends & (current >= 0), sem="relaxed")
        length = tl.where(ends, 1, length + 1)
        current = bins[d]
    tl.atomic_add(counts + current, length, mask=current >= 0, sem="relaxed")


def forward(counts: Tensor, prediction: Tensor, target: Tensor, ignore_index: int) -> None:
    """Writes counts [K, K], rows are targets; labels are not checked."""
    if not target.numel():
        counts.zero_()
        return
    launch = _plan(counts, prediction, target, ignore_index)
    launch.run()
    torch.sum(launch.args["counts"], 0, out=counts)


def _plan(counts: Tensor, prediction: Tensor, target: Tensor, ignore_index: int) -> Launch:
    n, height, width = target.shape
    classes = counts.shape[0]
    # 4 MiB of matrices, or the one that is needed.
    copies = min(max(2**19 // classes**2, 1), 64)
    runs = triton.cdiv(width, _RUN)
    blocks = triton.cdiv(height * runs, 128)
    extents = [(height - 1) * x.stride(1) + (width + _RUN) * x.stride(2) for x in (prediction, target)]
    args: dict[str, Any] = {
        "counts": counts.new_zeros(copies, classes, classes),
        "prediction": prediction,
        "target": target,
        "prediction_strides": prediction.stride(),
        "target_strides": target.stride(),
        "height": height,
        "width": width,
        "runs": runs,
        "blocks": blocks,
        "copies": copies,
        "ignore_index": ignore_index,
        "CLASSES": classes,
        "RUN": _RUN,
        "ALIGN": _alignment(width, prediction, target),
        "BLOCK": 128,
        "WIDE": max(extents) >= 2**31,
    }
    return Launch(_count, (n * blocks,), args)


def _alignment(width: int, *tensors: Tensor) -> int:
    """In elements: what every run, in memory, and the width are a multiple of, up to 16."""
    steps = [width, *(x.stride(axis) for x in tensors for axis in (0, 1))]
    return math.gcd(_RUN, *steps) if all(x.stride(2) == 1 for x in tensors) else 1


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named confusion_matrix/dtype of prediction/dtype of target/classes."""
    cases = []
    for prediction, target, classes in (("uint8", "uint8", 19), ("uint8", "int64", 150), ("int64", "int64", 150)):
        labels = [torch.empty(8, 512, 512, dtype=getattr(torch, x), device="meta") for x in (prediction, target)]
        counts = torch.empty(classes, classes, dtype=torch.int64, device="meta")
        cases.append((f"confusion_matrix/{prediction}/{target}/k{classes}", _plan(counts, *labels, 255)))
    return cases
