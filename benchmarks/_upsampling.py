"""What the benchmarks of the upsampling ops share: cases and plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from _peaks import Work
from _suite import FORWARD, TRAINING, Row
from torch import Tensor

from segops import _native
from segops.reference._sample import Labels, Sample

FP32, BF16 = torch.float32, torch.bfloat16
BOTH = ("nchw", "channels_last")
MIB = 1 << 20


def dup_case(name: str, h: int, w: int, factor: int, classes: int, channels: int = 64, n: int = 8) -> Sample:
    """A DUpsampling head on [n, channels, h, w], labels of [n, factor * h, factor * w]."""
    shapes = {
        "x": (n, channels, h, w),
        "weight": (factor * factor * classes, channels),
        "target": Labels((n, factor * h, factor * w), classes),
        "bias": (factor * factor * classes,),
    }
    return Sample(name, shapes, {"scale_factor": factor}, differentiable=("x", "weight", "bias"))


def bilinear_case(name: str, n: int, classes: int, h: int, w: int, factor: int) -> Sample:
    """Logits [n, classes, h, w] for labels of [n, factor * h, factor * w]."""
    shapes = {"logits": (n, classes, h, w), "target": Labels((n, factor * h, factor * w), classes)}
    return Sample(name, shapes, {}, differentiable=("logits",))


PASCAL = dup_case("dup_k21", 33, 33, 16, 21)  # ResNet-50 at output stride 16 on 513 x 513, 21 classes
ADE = dup_case("dup_k150", 32, 32, 16, 150)  # 512 x 512, 150 classes
ADE_X4 = bilinear_case("x4_k150", 1, 150, 128, 128, 4)
CITY_X8 = bilinear_case("x8_k19", 1, 19, 128, 256, 8)


def without_target(sample: Sample) -> Sample:
    shapes = {name: spec for name, spec in sample.shapes.items() if name != "target"}
    return replace(sample, shapes=shapes, differentiable=None)


def first_image(sample: Sample) -> Sample:
    """The batch cut to one image: the float64 oracle of all would not fit."""

    def cut(spec):
        return replace(spec, shape=(1, *spec.shape[1:])) if isinstance(spec, Labels) else (1, *spec[1:])

    maps = ("x", "logits", "target")
    return replace(sample, shapes={k: cut(v) if k in maps else v for k, v in sample.shapes.items()})


def tiny(sample: Sample) -> Sample:
    """One image, a quarter of the height."""
    sample = first_image(sample)
    target = sample.shapes.get("target")
    name = "x" if "x" in sample.shapes else "logits"
    n, c, h, w = sample.shapes[name]
    shapes = {**sample.shapes, name: (n, c, h // 4, w)}
    if target is not None:
        shapes["target"] = replace(target, shape=(n, h // 4 * (target.shape[1] // h), target.shape[2]))
    kwargs = dict(sample.kwargs)
    if "size" in kwargs:
        kwargs["size"] = (h // 4 * (kwargs["size"][0] // h), kwargs["size"][1])
    return replace(sample, shapes=shapes, kwargs=kwargs)


def layout_rows(
    device: str,
    sample: Sample,
    rivals: tuple[str, ...],
    gates: dict[str, dict[str, float]],
    directions: tuple[str, ...] = (FORWARD, TRAINING),
) -> list[Row]:
    """float32 with every rival and bfloat16 beside it, in both layouts; ``gates`` by direction."""
    rows = []
    for direction in directions:
        for layout in BOTH:
            gate = gates.get(direction, {}) if device == "cpu" else {}
            kept = rivals if layout == "nchw" else tuple(name for name in rivals if name != "compile")
            memory = direction == FORWARD and layout == "nchw"
            rows.append(Row(sample, FP32, layout, direction, device, rivals=kept, rival_memory=memory, gates=gate))
    for direction in directions:
        rows += [Row(sample, BF16, layout, direction, device, rivals=("eager",)) for layout in BOTH]
    if device == "cuda":
        return [replace(row, backend="triton") for row in rows]
    if _native.why_not("_C") is None and _native.cpu_isa() == "avx512":
        rows += [Row(sample, FP32, "nchw", direction, isa="avx2") for direction in directions]
    return rows


def dup_work(sample: Sample, dtype: torch.dtype, direction: str, label_bytes: int, exps: bool) -> list[Work]:
    """One product [r * r * K, C] x [C, cells] forward; backward repeats it and adds those for x and the weight."""
    n, c, h, w = sample.shapes["x"]
    columns = sample.shapes["weight"][0]
    products, softmax = 2 * n * h * w * c * columns, n * h * w * columns if exps else 0
    tensors = (n * c * h * w + columns * c) * dtype.itemsize
    labels = n * h * w * sample.kwargs["scale_factor"] ** 2 * label_bytes
    forward, backward = Work(tensors + labels, products, softmax), Work(2 * tensors + labels, 3 * products, softmax)
    return [forward] if direction == FORWARD else [forward, backward]


def bilinear_work(
    sample: Sample, size: tuple[int, int], dtype: torch.dtype, direction: str, label_bytes: int, exps: bool
) -> list[Work]:
    """8 flops to interpolate a logit and 8 to spread its gradient.

    Between two source columns a row of logits is linear, hence its exponentials a geometric series: two suffice.
    """
    n, k, h, w = sample.shapes["logits"]
    out = n * k * size[0] * size[1]
    softmax = n * k * size[0] * min(size[1], 2 * w) if exps else 0
    tensor, labels = n * k * h * w * dtype.itemsize, n * size[0] * size[1] * label_bytes
    forward, backward = Work(tensor + labels, 8 * out, softmax), Work(2 * tensor + labels, 16 * out, softmax)
    return [forward] if direction == FORWARD else [forward, backward]


def pixel_shuffled(x: Tensor, weight: Tensor, bias: Tensor, factor: int) -> Tensor:
    """Full-size logits by a 1x1 convolution and PixelShuffle, whose channels run (k, dy, dx)."""
    classes = weight.shape[0] // factor**2

    def order(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (factor * factor, classes)).transpose(0, 1).flatten(0, 1)

    return F.pixel_shuffle(F.conv2d(x, order(weight)[..., None, None], order(bias)), factor)
