"""The losses of class-aware regularisation, against one-hot products in plain PyTorch.

python -m pytest benchmarks/bench_car_losses.py --benchmark-json=raw.json
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from _peaks import Work
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite
from _upsampling import BOTH
from bench_class_centers import ADE, CONTEXT, one_hot, tiny
from torch import Tensor

import segops
from segops.reference._sample import Sample

GATES = {ADE.name: {FORWARD: 4, TRAINING: 3.5}, CONTEXT.name: {FORWARD: 5, TRAINING: 4}}


def rows(device: str) -> list[Row]:
    found = []
    for sample in (ADE, CONTEXT):
        for layout in BOTH:
            for direction in (FORWARD, TRAINING):
                gates = {"eager": GATES[sample.name][direction]}
                row = Row(sample, torch.float32, layout, direction, device, gates=gates)
                found.append(replace(row, rival_memory=direction == TRAINING))
        found += [Row(sample, torch.bfloat16, "nchw", direction, device) for direction in (FORWARD, TRAINING)]
    return found


def loss(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return sum(segops.car_losses(features, labels, num_classes))


def between_classes(mu: Tensor) -> Tensor:
    classes, c = mu.shape
    share = (mu @ mu.detach().mT * c**-0.5).softmax(1)
    over = F.relu(share - 0.5 / (classes - 1)) * (1 - torch.eye(classes, device=mu.device))
    return over.sum(1).clamp(1e-7, 1 - 1e-7).mean().square()


def by_planes(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """Features as [N, C, P]."""
    classes = sample.kwargs["num_classes"]

    def run(features: Tensor, labels: Tensor) -> Tensor:
        x, hot = features.flatten(2), one_hot(labels, classes, features.dtype)
        mu = torch.bmm(x, hot).sum(0).mT / hot.sum((0, 1)).clamp(min=1).unsqueeze(1)
        fixed, turned = mu.detach(), hot.mT
        known = (labels != 255).flatten(1).unsqueeze(1)
        intra = ((fixed.mT @ turned - x).abs() * known).mean().square().clamp(min=1e-5)
        energy = torch.where(turned > 0, fixed.square().sum(1, keepdim=True), fixed @ x) * x.shape[1] ** -0.5
        over = F.relu(energy.softmax(1) - 0.25 / (classes - 1)) * (1 - turned)
        return intra + between_classes(mu) + over.sum(1).clamp(1e-7, 1 - 1e-7).mean().square()

    return run


def by_rows(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """Features as [N P, C]."""
    classes = sample.kwargs["num_classes"]

    def run(features: Tensor, labels: Tensor) -> Tensor:
        x = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        hot = one_hot(labels, classes, features.dtype).flatten(0, 1)
        mu = hot.mT @ x / hot.sum(0).clamp(min=1).unsqueeze(1)
        fixed, known = mu.detach(), (labels != 255).flatten().unsqueeze(1)
        intra = ((hot @ fixed - x).abs() * known).mean().square().clamp(min=1e-5)
        energy = torch.where(hot > 0, fixed.square().sum(1), x @ fixed.mT) * x.shape[1] ** -0.5
        over = F.relu(energy.softmax(1) - 0.25 / (classes - 1)) * (1 - hot)
        return intra + between_classes(mu) + over.sum(1).clamp(1e-7, 1 - 1e-7).mean().square()

    return run


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """Features are read once for the centres and once for the losses; backward reads them and writes their gradient."""
    (n, c, h, w), classes = sample.shapes["features"], sample.kwargs["num_classes"]
    pixels, bytes_of_map = n * h * w, n * c * h * w * dtype.itemsize
    passes = [Work(2 * bytes_of_map, 2 * pixels * c * classes, pixels * classes)]
    if direction == TRAINING:
        passes.append(Work(2 * bytes_of_map, 4 * pixels * c * classes, pixels * classes))
    return passes


def room(sample: Sample, dtype: torch.dtype) -> int:
    """A tenth of the features, and K x C."""
    n, c, h, w = sample.shapes["features"]
    return n * c * h * w * dtype.itemsize // 10 + 4 * sample.kwargs["num_classes"] * c


SUITE = Suite(
    op="car_losses",
    function=loss,
    rows=rows,
    work=work,
    extra_memory=room,
    rivals=(
        Rival("eager", by_planes, "planes", layouts=BOTH),
        Rival("eager", by_rows, "rows", layouts=BOTH),
    ),
    tiny=tiny,
)


def test_car_losses(row, measure):
    measure(SUITE, row)
