"""Full-size logits from a DUpsampling head, against a 1x1 convolution and PixelShuffle.

python -m pytest benchmarks/bench_dupsample.py --benchmark-json=raw.json
"""

from __future__ import annotations

import torch
from _peaks import Work
from _suite import Function, Rival, Row, Suite
from _upsampling import BOTH, MIB, PASCAL, dup_work, first_image, layout_rows, pixel_shuffled, tiny, without_target
from torch import Tensor

import segops
from segops.reference._sample import Sample


def rows(device: str) -> list[Row]:
    return layout_rows(device, without_target(PASCAL), ("eager", "compile"), {})


def shuffle(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pixel_shuffled(x, weight, bias, sample.kwargs["scale_factor"])

    return run


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return torch.compile(shuffle(sample, dtype, device, direction), dynamic=False)


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """The logits are written, and their gradient read; backward has no product to repeat."""
    n, _, h, w = sample.shapes["x"]
    logits = n * h * w * sample.shapes["weight"][0] * dtype.itemsize
    passes = dup_work(sample, dtype, direction, label_bytes=0, exps=False)
    flops = passes[0].flops
    return [Work(p.bytes + logits, flops * (i + 1), 0) for i, p in enumerate(passes)]


SUITE = Suite(
    op="dupsample",
    function=segops.dupsample,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 * MIB,
    rivals=(Rival("eager", shuffle, layouts=BOTH), Rival("compile", compiled, compiled=True)),
    tiny=tiny,
    checked=first_image,
)


def test_dupsample(row, measure):
    measure(SUITE, row)
