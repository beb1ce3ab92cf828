"""What bench_multi_scale_strip_conv and bench_msca share: MSCAN's four stages, necessary work, eager PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from _peaks import Work
from _suite import FORWARD, TRAINING, Row
from torch import Tensor

from segops import _native
from segops.reference._sample import Sample
from segops.reference.multi_scale_strip_conv import depthwise

BOTH = ("nchw", "channels_last")
# SegNeXt-S, -B and -L on eight images of 512 x 512.
STAGES = {
    "stage1": (8, 64, 128, 128),
    "stage2": (8, 128, 64, 64),
    "stage3": (8, 320, 32, 32),
    "stage4": (8, 512, 16, 16),
}
Gates = dict[tuple[str, str], dict[str, float]]


def cases(*, proj: bool) -> list[Sample]:
    found = []
    for name, shape in STAGES.items():
        shapes, c = depthwise(shape), shape[1]
        found.append(Sample(name, shapes | ({"proj_weight": (c, c), "proj_bias": (c,)} if proj else {}), scale=0.2))
    return found


def rows(device: str, samples: list[Sample], gates: Gates) -> list[Row]:
    """Both layouts in float32 and bfloat16; torch.compile beside float32 in NCHW."""
    found = []
    for sample in samples:
        for direction in (FORWARD, TRAINING):
            gate = gates.get((sample.name, direction), {}) if device == "cpu" else {}
            for layout in BOTH:
                rivals = ("eager", "compile") if layout == "nchw" else ("eager",)
                memory = layout == "nchw"
                row = Row(
                    sample, torch.float32, layout, direction, device, rivals=rivals, rival_memory=memory, gates=gate
                )
                found += [row, replace(row, dtype=torch.bfloat16, rivals=("eager",), rival_memory=False, gates={})]
            if device == "cpu" and _native.why_not("_C") is None and _native.cpu_isa() == "avx512":
                found.append(Row(sample, torch.float32, "nchw", direction, isa="avx2"))
    if device == "cuda":
        return [replace(row, backend=backend) for row in found for backend in ("triton", "cuda")]
    return found


def strip_work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """x is read and the result written. Backward reads x and the result's gradient and writes x's; it makes
    the gradients of maps and taps, and the maps between the convolutions once more."""
    elements = math.prod(sample.shapes["x"])
    kernel = math.prod(sample.shapes["weight"][2:])
    across = sum(strip[0][3] for strip in sample.shapes["strips"])
    forward = Work(2 * elements * dtype.itemsize, 2 * elements * (kernel + 2 * across), 0)
    backward = Work(3 * elements * dtype.itemsize, 2 * elements * (3 * kernel + 5 * across), 0)
    return [forward] if direction == FORWARD else [forward, backward]


def strips(x: Tensor, weight: Tensor, bias: Tensor | None, strips: list) -> Tensor:
    """A convolution each, as every SegNeXt has it."""
    groups = x.shape[1]
    a = F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2), groups=groups)
    out = a
    for across, b, down, d in strips:
        h = F.conv2d(a, across, b, padding=(0, across.shape[3] // 2), groups=groups)
        out = out + F.conv2d(h, down, d, padding=(down.shape[2] // 2, 0), groups=groups)
    return out


def tiny(sample: Sample) -> Sample:
    """One image of a quarter of the size."""
    _, c, h, w = sample.shapes["x"]
    return replace(sample, shapes={**sample.shapes, "x": (1, c, h // 4, w // 4)})


def first_image(sample: Sample) -> Sample:
    return replace(sample, shapes={**sample.shapes, "x": (1, *sample.shapes["x"][1:])})
