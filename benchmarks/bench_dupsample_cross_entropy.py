"""DUpsampling with its cross-entropy against the full-size logits that a user would otherwise store.

python -m pytest benchmarks/bench_dupsample_cross_entropy.py --benchmark-json=raw.json
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite, Unavailable
from _upsampling import ADE, BOTH, MIB, PASCAL, dup_work, first_image, layout_rows, pixel_shuffled, tiny
from torch import Tensor

import segops
from segops.reference._sample import Sample

GATES = {
    PASCAL.name: {FORWARD: {"eager": 5, "linear_ce": 0.95}, TRAINING: {"eager": 4, "linear_ce": 0.95}},
    ADE.name: {FORWARD: {"eager": 8, "linear_ce": 0.95}, TRAINING: {"eager": 5, "linear_ce": 0.95}},
}


def rows(device: str) -> list[Row]:
    rivals = ("eager", "compile", "linear_ce")
    return [row for sample in (PASCAL, ADE) for row in layout_rows(device, sample, rivals, GATES[sample.name])]


def shuffle(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """1x1 convolution, PixelShuffle, cross_entropy."""

    def run(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        logits = pixel_shuffled(x, weight, bias, sample.kwargs["scale_factor"])
        return F.cross_entropy(logits, target, ignore_index=255)

    return run


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    return torch.compile(shuffle(sample, dtype, device, direction), dynamic=False)


def linear(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """torch's own fusion: cells are rows, and their r * r labels are the extra axes of the weight [K, r, r, C]."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    factor = sample.kwargs["scale_factor"]

    def run(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        w = weight.unflatten(0, (factor, factor, -1)).permute(2, 0, 1, 3).contiguous()
        b = bias.unflatten(0, (factor, factor, -1)).permute(2, 0, 1).contiguous()
        labels = target.unflatten(1, (-1, factor)).unflatten(3, (-1, factor)).transpose(2, 3).flatten(0, 2)
        return F.linear_cross_entropy(x.permute(0, 2, 3, 1).flatten(0, 2), w, labels, linear_bias=b, ignore_index=255)

    return run


def work(sample: Sample, dtype: torch.dtype, direction: str):
    return dup_work(sample, dtype, direction, label_bytes=8, exps=True)


SUITE = Suite(
    op="dupsample_cross_entropy",
    function=segops.dupsample_cross_entropy,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 * MIB,
    rivals=(
        Rival("eager", shuffle, layouts=BOTH),
        Rival("compile", compiled, compiled=True),
        Rival("linear_ce", linear, layouts=("channels_last",)),
    ),
    tiny=tiny,
    checked=first_image,
)


def test_dupsample_cross_entropy(row, measure):
    measure(SUITE, row)
