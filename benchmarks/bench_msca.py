"""SegNeXt's MSCA, against eight convolutions and a product.

python -m pytest benchmarks/bench_msca.py --benchmark-json=raw.json
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from _peaks import Work
from _strips import BOTH, cases, first_image, rows, strip_work, strips, tiny
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite
from torch import Tensor

import segops
from segops.reference._sample import Sample

# Times faster than eager in its best memory format, on the CPU.
GATES = {
    ("stage1", FORWARD): {"eager": 4}, ("stage1", TRAINING): {"eager": 6},
    ("stage2", FORWARD): {"eager": 1.5}, ("stage2", TRAINING): {"eager": 4},
    ("stage3", FORWARD): {"eager": 1.15}, ("stage3", TRAINING): {"eager": 2.5},
    ("stage4", FORWARD): {"eager": 0.95}, ("stage4", TRAINING): {"eager": 1.6},
}  # fmt: skip


def all_rows(device: str) -> list[Row]:
    return rows(device, cases(proj=True), GATES)


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """The strips' bytes and products, and one matrix product forward, two backward."""
    product = 2 * math.prod(sample.shapes["x"]) * sample.shapes["x"][1]
    passes = strip_work(sample, dtype, direction)
    return [Work(p.bytes, p.flops + product * (i + 1), 0) for i, p in enumerate(passes)]


def extra_memory(sample: Sample, dtype: torch.dtype) -> int:
    """The strips' result."""
    return math.prod(sample.shapes["x"]) * dtype.itemsize + (16 << 20)


def attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, strips_: list, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    return F.conv2d(strips(x, weight, bias, strips_), proj_weight[:, :, None, None], proj_bias) * x


def eager(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return lambda **tensors: attention(*tensors.values())


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    function = torch.compile(attention, dynamic=False)
    return lambda **tensors: function(*tensors.values())


SUITE = Suite(
    op="msca",
    function=segops.msca,
    rows=all_rows,
    work=work,
    extra_memory=extra_memory,
    rivals=(Rival("eager", eager, layouts=BOTH), Rival("compile", compiled, compiled=True)),
    tiny=tiny,
    checked=first_image,
)


def test_msca(row, measure):
    measure(SUITE, row)
