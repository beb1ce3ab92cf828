"""Cross-entropy at full resolution from small logits, against interpolate and cross_entropy.

python -m pytest benchmarks/bench_upsample_cross_entropy.py --benchmark-json=raw.json
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite
from _upsampling import ADE_X4, BOTH, CITY_X8, MIB, bilinear_work, layout_rows, tiny
from torch import Tensor

import segops
from segops.reference._sample import Sample

GATES = {FORWARD: {"eager": 8}, TRAINING: {"eager": 10}}


def rows(device: str) -> list[Row]:
    return [row for sample in (ADE_X4, CITY_X8) for row in layout_rows(device, sample, ("eager", "compile"), GATES)]


def interpolated(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    def run(logits: Tensor, target: Tensor) -> Tensor:
        full = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(full, target, ignore_index=255)

    return run


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return torch.compile(interpolated(sample, dtype, device, direction), dynamic=False)


def work(sample: Sample, dtype: torch.dtype, direction: str):
    size = sample.shapes["target"].shape[1:]
    return bilinear_work(sample, size, dtype, direction, label_bytes=8, exps=True)


SUITE = Suite(
    op="upsample_cross_entropy",
    function=segops.upsample_cross_entropy,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 * MIB,
    rivals=(Rival("eager", interpolated, layouts=BOTH), Rival("compile", compiled, compiled=True)),
    tiny=tiny,
)


def test_upsample_cross_entropy(row, measure):
    measure(SUITE, row)
