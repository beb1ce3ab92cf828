"""The depthwise part of SegNeXt's MSCA, against seven convolutions.

python -m pytest benchmarks/bench_multi_scale_strip_conv.py --benchmark-json=raw.json
"""

from __future__ import annotations

import torch
from _strips import BOTH, cases, first_image, rows, strip_work, strips, tiny
from _suite import FORWARD, Function, Rival, Row, Suite

import segops
from segops.reference._sample import Sample


def all_rows(device: str) -> list[Row]:
    return rows(device, cases(proj=False), {("stage1", FORWARD): {"floor": 25}})


def eager(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return strips


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return torch.compile(strips, dynamic=False)


SUITE = Suite(
    op="multi_scale_strip_conv",
    function=segops.multi_scale_strip_conv,
    rows=all_rows,
    work=strip_work,
    extra_memory=lambda sample, dtype: 16 << 20,
    rivals=(Rival("eager", eager, layouts=BOTH), Rival("compile", compiled, compiled=True)),
    tiny=tiny,
    checked=first_image,
)


def test_multi_scale_strip_conv(row, measure):
    measure(SUITE, row)
