"""Counting pixels by target and prediction, against bincount.

python -m pytest benchmarks/bench_confusion_matrix.py --benchmark-json=raw.json
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _peaks import Work
from _suite import FORWARD, Function, Rival, Row, Suite
from torch import Tensor

import segops
from segops.reference._sample import Labels, Sample


def _case(name: str, n: int, h: int, w: int, classes: int) -> Sample:
    prediction = Labels((n, h, w), classes, ignored=0.0, dtype=torch.uint8)
    shapes = {"prediction": prediction, "target": Labels((n, h, w), classes)}
    return Sample(name, shapes, {"num_classes": classes}, differentiable=())


CITY = _case("city_k19", 1, 1024, 2048, 19)
ADE = _case("ade_k150", 8, 512, 512, 150)


def rows(device: str) -> list[Row]:
    found = [Row(sample, torch.float32, "nchw", FORWARD, device) for sample in (CITY, ADE)]
    return [replace(row, backend="triton") for row in found] if device == "cuda" else found


def bincount(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    classes = sample.kwargs["num_classes"]

    def run(prediction: Tensor, target: Tensor) -> Tensor:
        counted = target != 255
        pairs = target[counted] * classes + prediction[counted]
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    return run


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """One byte of prediction and eight of target per pixel."""
    n, h, w = sample.shapes["target"].shape
    return [Work(9 * n * h * w, 0, 0)]


def tiny(sample: Sample) -> Sample:
    return replace(sample, shapes={k: replace(v, shape=(1, 64, 64)) for k, v in sample.shapes.items()})


SUITE = Suite(
    op="confusion_matrix",
    function=segops.confusion_matrix,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 << 20,
    rivals=(Rival("eager", bincount),),
    tiny=tiny,
)


def test_confusion_matrix(row, measure):
    measure(SUITE, row)
