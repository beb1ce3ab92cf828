"""Class centres of a feature map, against one-hot products and index_add.

python -m pytest benchmarks/bench_class_centers.py --benchmark-json=raw.json
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from _peaks import Work
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite
from _upsampling import BOTH, MIB
from torch import Tensor

import segops
from segops.reference._sample import Labels, Sample


def case(name: str, classes: int) -> Sample:
    """CAR's features of eight crops of 512 x 512 at stride 8."""
    shapes = {"features": (8, 512, 64, 64), "labels": Labels((8, 64, 64), classes, 0.05, torch.uint8)}
    return Sample(name, shapes, {"num_classes": classes}, differentiable=("features",))


ADE, CONTEXT = case("ade_k150", 150), case("context_k60", 60)


def rows(device: str) -> list[Row]:
    found = []
    for sample in (ADE, CONTEXT):
        for layout in BOTH:
            found += [Row(sample, torch.float32, layout, direction, device) for direction in (FORWARD, TRAINING)]
        found.append(Row(sample, torch.bfloat16, "nchw", FORWARD, device))
    return found


def centers(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return segops.class_centers(features, labels, num_classes).centers


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[N, P, K], 0 where ignored."""
    labels = labels.flatten(1).long()
    return F.one_hot(labels.where(labels != 255, classes), classes + 1)[..., :classes].to(dtype)


def by_planes(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    def run(features: Tensor, labels: Tensor) -> Tensor:
        hot = one_hot(labels, sample.kwargs["num_classes"], features.dtype)
        sums = torch.bmm(features.flatten(2), hot).sum(0).mT
        return sums / hot.sum((0, 1)).clamp(min=1).unsqueeze(1)

    return run


def by_rows(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    def run(features: Tensor, labels: Tensor) -> Tensor:
        hot = one_hot(labels, sample.kwargs["num_classes"], features.dtype).flatten(0, 1)
        x = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        return hot.mT @ x / hot.sum(0).clamp(min=1).unsqueeze(1)

    return run


def by_index(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    def run(features: Tensor, labels: Tensor) -> Tensor:
        classes, x = sample.kwargs["num_classes"], features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        index = labels.flatten().long()
        index = index.where(index != 255, classes)
        sums = x.new_zeros(classes + 1, x.shape[1]).index_add(0, index, x)[:classes]
        return sums / torch.bincount(index, minlength=classes + 1)[:classes].clamp(min=1).unsqueeze(1)

    return run


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """The features are read, and their gradient written; one addition each."""
    n, c, h, w = sample.shapes["features"]
    passes = [Work(n * c * h * w * dtype.itemsize, n * c * h * w, 0)]
    if direction == TRAINING:
        passes.append(Work(n * c * h * w * dtype.itemsize, 0, 0))
    return passes


def tiny(sample: Sample) -> Sample:
    labels = replace(sample.shapes["labels"], shape=(1, 16, 16))
    return replace(sample, shapes={"features": (1, 512, 16, 16), "labels": labels})


SUITE = Suite(
    op="class_centers",
    function=centers,
    rows=rows,
    work=work,
    extra_memory=lambda sample, dtype: 16 * MIB,
    rivals=tuple(
        Rival("eager", prepare, variant, layouts=BOTH)
        for variant, prepare in (("planes", by_planes), ("rows", by_rows), ("index_add", by_index))
    ),
    tiny=tiny,
)


def test_class_centers(row, measure):
    measure(SUITE, row)
