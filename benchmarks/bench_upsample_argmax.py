"""The full-size label map from small logits, against interpolate and argmax.

python -m pytest benchmarks/bench_upsample_argmax.py --benchmark-json=raw.json
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from _suite import FORWARD, Function, Rival, Row, Suite
from _upsampling import ADE_X4, BOTH, CITY_X8, MIB, bilinear_work, layout_rows, tiny, without_target
from torch import Tensor

import segops
from segops.reference._sample import Sample

GATES = {FORWARD: {"eager": 8}}


def _case(sample: Sample) -> Sample:
    return replace(without_target(sample), kwargs={"size": sample.shapes["target"].shape[1:]})


def rows(device: str) -> list[Row]:
    samples = (_case(ADE_X4), _case(CITY_X8))
    return [row for s in samples for row in layout_rows(device, s, ("eager", "compile"), GATES, (FORWARD,))]


def interpolated(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    def run(logits: Tensor) -> Tensor:
        full = F.interpolate(logits, sample.kwargs["size"], mode="bilinear", align_corners=False)
        return full.argmax(1).to(torch.uint8)

    return run


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return torch.compile(interpolated(sample, dtype, device, direction), dynamic=False)


def work(sample: Sample, dtype: torch.dtype, direction: str):
    return bilinear_work(sample, sample.kwargs["size"], dtype, direction, label_bytes=1, exps=False)


SUITE = Suite(
    op="upsample_argmax",
    function=segops.upsample_argmax,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 * MIB,
    rivals=(Rival("eager", interpolated, layouts=BOTH), Rival("compile", compiled, compiled=True)),
    tiny=tiny,
)


def test_upsample_argmax(row, measure):
    measure(SUITE, row)
