"""Hamburger's non-negative matrix factorisation against eager PyTorch and its compilation.

python -m pytest benchmarks/bench_nmf2d.py --benchmark-json=raw.json
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _peaks import Work
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite
from _upsampling import BOTH, MIB
from torch import Tensor

import segops
from segops import _dispatch
from segops.reference._sample import Sample, Uniform
from segops.reference.nmf2d import nmf2d as reference


def case(name: str, n: int, channels: int, side: int, rank: int) -> Sample:
    """The map that a SegNeXt of that width factorises, at 1/8 of an image of 8 * side."""
    shapes = {"x": Uniform((n, channels, side, side), 0.0, 2.0), "bases": Uniform((channels, rank), 0.0, 0.08)}
    return Sample(name, shapes, {"steps": 6}, differentiable=("x",))


HAM_B = case("ham_b", 1, 512, 64, 64)  # SegNeXt-B, one image of 512 x 512
HAM_T = case("ham_t", 4, 256, 64, 16)  # SegNeXt-T, four of them


def rows(device: str) -> list[Row]:
    found = []
    for sample in (HAM_B, HAM_T):
        for layout in BOTH:
            for direction in (FORWARD, TRAINING):
                rivals = ("eager", "compile") if layout == "nchw" else ("eager",)
                gates = {"eager": 1.2} if sample is HAM_B else {}
                row = Row(sample, torch.float32, layout, direction, device, rivals=rivals, gates=gates)
                found.append(replace(row, rival_memory=direction == TRAINING))
        found.append(Row(sample, torch.bfloat16, "nchw", TRAINING, device))
    return found


def eager(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    def run(x: Tensor, bases: Tensor) -> Tensor:
        return reference(x, bases.float().expand(x.shape[0], -1, -1), sample.kwargs["steps"], "unrolled", 1e-6)[0]

    return run


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return torch.compile(eager(sample, dtype, device, direction), dynamic=False)


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """x is read and the result written; backward reads x and the result's gradient, and writes x's. The updates between
    are multiply-adds and one softmax; without those that a second X^T B_0 would take."""
    x, bases = sample.shapes["x"].shape, sample.shapes["bases"].shape
    n, c, h, w = x
    steps, bytes_of_map = sample.kwargs["steps"], n * c * h * w * dtype.itemsize
    shapes, repeated = (x, (n, *bases)), 2 * n * h * w * c * bases[1]
    forward = _dispatch.OPS["nmf2d"].flops(*shapes, steps, "unrolled", 1e-6, True) - repeated
    passes = [Work(2 * bytes_of_map, forward, n * h * w * bases[1])]
    if direction == TRAINING:
        backward = _dispatch.OPS["nmf2d_backward"].flops(x, *shapes, None, None, steps, "unrolled", 1e-6, False)
        passes.append(Work(3 * bytes_of_map, backward - repeated, 0))
    return passes


def tiny(sample: Sample) -> Sample:
    shape = sample.shapes["x"].shape
    return replace(sample, shapes={**sample.shapes, "x": Uniform((1, shape[1], 16, 16), 0.0, 2.0)})


SUITE = Suite(
    op="nmf2d",
    function=segops.nmf2d,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 * MIB,
    rivals=(Rival("eager", eager, layouts=BOTH), Rival("compile", compiled, compiled=True)),
    tiny=tiny,
)


def test_nmf2d(row, measure):
    measure(SUITE, row)
