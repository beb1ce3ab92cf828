"""The label map straight from a DUpsampling head, against full-size logits and their argmax.

python -m pytest benchmarks/bench_dupsample_argmax.py --benchmark-json=raw.json
"""

from __future__ import annotations

import torch
from _suite import FORWARD, Function, Rival, Row, Suite
from _upsampling import ADE, BOTH, MIB, PASCAL, dup_work, first_image, layout_rows, pixel_shuffled, tiny, without_target
from torch import Tensor

import segops
from segops.reference._sample import Sample

GATES = {PASCAL.name: {FORWARD: {"eager": 8}}}


def rows(device: str) -> list[Row]:
    samples = (without_target(PASCAL), without_target(ADE))
    rivals = ("eager", "compile")
    return [row for s in samples for row in layout_rows(device, s, rivals, GATES.get(s.name, {}), (FORWARD,))]


def shuffle(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """1x1 convolution, PixelShuffle, argmax."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pixel_shuffled(x, weight, bias, sample.kwargs["scale_factor"]).argmax(1).to(torch.uint8)

    return run


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return torch.compile(shuffle(sample, dtype, device, direction), dynamic=False)


def work(sample: Sample, dtype: torch.dtype, direction: str):
    return dup_work(sample, dtype, direction, label_bytes=1, exps=False)


SUITE = Suite(
    op="dupsample_argmax",
    function=segops.dupsample_argmax,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 * MIB,
    rivals=(Rival("eager", shuffle, layouts=BOTH), Rival("compile", compiled, compiled=True)),
    tiny=tiny,
    checked=first_image,
)


def test_dupsample_argmax(row, measure):
    measure(SUITE, row)
