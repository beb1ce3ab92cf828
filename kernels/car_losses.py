"""The pixel losses of class-aware regularisation in Triton; what stands between pixels and classes is not stored.

    E_k = x . mu_k / sqrt(C), |mu_y|^2 / sqrt(C) at the own class,  B = softmax_k E,  v_k = [B_k > threshold, k != y]
    forward    intra = sum |x - mu_y|,  e = sum_k v_k (B_k - threshold),  inner = sum_k v_k B_k
    backward   dx = g sign(x - mu_y) + sum_{k != y} h B_k (v_k - inner) mu_k / sqrt(C) + dS_y

Layout: features [N, C, h, w] and labels [N, h, w], any strides; centers and dS [K, C] or [N, K, C], lse and inner
[N, h, w], contiguous.

A program owns some pixels of an image, and holds E for up to 256 classes; of more it computes them again, forward once
and backward once for every 128 or 256 channels. Centres are float32: beside bfloat16 features they come as sums of
bfloat16 numbers, three of which hold them in full, so that tensor cores multiply. float16 has not the range: it is
widened.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import dot, rounded
from ._launch import Launch
from ._pixels import classes_of, flat, offsets, wide

__all__ = ["aot_cases", "backward", "forward"]


@triton.jit
def _load(x, rows, inside, c, x_strides, C: tl.constexpr, WIDE: tl.constexpr):
    """Channels c of the pixels: [channels, pixels]."""
    columns = (c.to(tl.int64) if WIDE else c) * x_strides[1]
    return tl.load(x + columns[:, None] + rows[None, :], mask=(c < C)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _own(table, label, c, C: tl.constexpr):
    """What the rows of the pixels' classes hold of channels c; 0 where there is no class."""
    at = table + label[None, :] * C + c[:, None]
    return tl.load(at, mask=(c < C)[:, None] & (label >= 0)[None, :], other=0.0)


@triton.jit
def _energy(
    x, rows, inside, x_strides, scaled, part_step, k, centers, near, K: tl.constexpr, C: tl.constexpr,
    BLOCK_C: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x . mu / sqrt(C) for classes k: [classes, pixels]; and |x - mu_near|, 0 where near < 0: [pixels]."""
    acc = tl.zeros([k.shape[0], rows.shape[0]], ACC)
    distance = tl.zeros([rows.shape[0]], ACC)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        tile = _load(x, rows, inside, c, x_strides, C, WIDE)
        at = scaled + k[:, None] * C + c[None, :]
        for part in tl.static_range(PARTS):
            mu = tl.load(at + part * part_step, mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)
            acc = dot(mu, tile.to(scaled.dtype.element_ty), acc, INTERPRET)
        if near is not None:
            apart = tl.sum(tl.abs(tile.to(ACC) - _own(centers, near, c, C)), 0)
            distance += tl.where(near >= 0, apart, 0.0)
    return acc, distance


@triton.jit
def _shares(energy, lse, k, label, K: tl.constexpr):
    """B of the classes that are foreign to a pixel, else 0."""
    foreign = (k < K)[:, None] & (k[:, None] != label[None, :])
    return tl.exp(tl.where(foreign, energy - lse[None, :], float("-inf")))


@triton.jit
def _forward(
    parts, lse, inner, x, labels, centers, scaled, own, x_strides, label_strides, pixels, width, tiles, ignore_index,
    centers_step, own_step, part_step,
    THRESHOLD: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    MASK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """lse and inner; a program's sums of intra and c2p in parts [2, programs]."""
    program = tl.program_id(0)
    image = program // tiles
    pixel = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    label = classes_of(labels, label_strides, image, pixel, inside, width, ignore_index, K, WIDE)
    rows = offsets(x_strides, image, pixel, width, FLAT, WIDE)
    centers += image * centers_step
    scaled += image * centers_step
    own += image * own_step

    top = tl.full([BLOCK_P], -1.0e38, ACC)
    total = tl.zeros([BLOCK_P], ACC)
    intra = tl.zeros([BLOCK_P], ACC)
    energy = tl.zeros([BLOCK_K, BLOCK_P], ACC)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        near = tl.where((label >= first) & (label < first + BLOCK_K), label, -1)
        energy, distance = _energy(
            x, rows, inside, x_strides, scaled, part_step, k, centers, near, K, C, BLOCK_C, PARTS, WIDE, ACC, INTERPRET
        )  # fmt: skip
        intra += distance
        square = tl.load(own + k, mask=k < K, other=float("-inf"))
        energy = tl.where((k[:, None] == label[None, :]) | (k >= K)[:, None], square[:, None], energy)
        higher = tl.maximum(top, tl.max(energy, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(energy - higher[None, :]), 0)
        top = higher
    log_sum = top + tl.log(total)

    excess = tl.zeros([BLOCK_P], ACC)
    above = tl.zeros([BLOCK_P], ACC)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        if K > BLOCK_K:
            energy, _ = _energy(
                x, rows, inside, x_strides, scaled, part_step, k, centers, None, K, C, BLOCK_C, PARTS, WIDE, ACC,
                INTERPRET,
            )  # fmt: skip
        share = _shares(energy, log_sum, k, label, K)
        under = share <= THRESHOLD  # this way round, NaN stays
        excess += tl.sum(tl.where(under, 0.0, share - THRESHOLD), 0)
        above += tl.sum(tl.where(under, 0.0, share), 0)
    counts = inside
    if MASK:
        counts = label >= 0
    e = tl.where(excess < LOW, LOW, tl.where(excess > HIGH, HIGH, excess))  # NaN stays, and is not clipped
    clipped = (e != excess) & (excess == excess)
    at = image.to(tl.int64) * pixels + pixel
    tl.store(lse + at, log_sum, mask=inside)
    tl.store(inner + at, tl.where(counts & ~clipped, above, -1.0), mask=inside)
    tl.store(parts + program, tl.sum(intra, 0))
    tl.store(parts + tl.num_programs(0) + program, tl.sum(tl.where(counts, e, 0.0), 0))


@triton.jit
def _energy_gradient(energy, log_sum, mean, k, label, THRESHOLD: tl.constexpr, K: tl.constexpr):
    """d c2p / dE, without the factor of its gradient."""
    share = _shares(energy, log_sum, k, label, K)
    mean = mean[None, :]
    return tl.where(mean < 0, 0.0, share * tl.where(share > THRESHOLD, 1.0 - mean, -mean))


@triton.jit
def _backward(
    grad_x, grad_intra, grad_c2p, grad_sums, x, labels, centers, scaled, lse, inner, grad_strides, x_strides,
    label_strides, pixels, width, tiles, ignore_index, centers_step, grad_sums_step, part_step,
    THRESHOLD: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_OUT: tl.constexpr, PARTS: tl.constexpr, FLAT: tl.constexpr, GRAD_FLAT: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = program // tiles
    pixel = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    label = classes_of(labels, label_strides, image, pixel, inside, width, ignore_index, K, WIDE)
    rows = offsets(x_strides, image, pixel, width, FLAT, WIDE)
    grad_rows = offsets(grad_strides, image, pixel, width, GRAD_FLAT, WIDE)
    at = image.to(tl.int64) * pixels + pixel
    log_sum = tl.load(lse + at, mask=inside, other=0.0)
    mean = tl.load(inner + at, mask=inside, other=-1.0)
    of_intra = tl.load(grad_intra)
    of_c2p = tl.load(grad_c2p)
    centers += image * centers_step
    scaled += image * centers_step
    operand = scaled.dtype.element_ty

    k = tl.arange(0, BLOCK_K)
    slope = tl.zeros([BLOCK_K, BLOCK_P], operand)
    if K <= BLOCK_K:
        energy, _ = _energy(
            x, rows, inside, x_strides, scaled, part_step, k, centers, None, K, C, BLOCK_C, PARTS, WIDE, ACC, INTERPRET
        )  # fmt: skip
        slope = rounded(_energy_gradient(energy, log_sum, mean, k, label, THRESHOLD, K), operand, INTERPRET)
    for first_channel in range(0, C, BLOCK_OUT):
        c = first_channel + tl.arange(0, BLOCK_OUT)
        acc = tl.zeros([BLOCK_OUT, BLOCK_P], ACC)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            if K > BLOCK_K:
                energy, _ = _energy(
                    x, rows, inside, x_strides, scaled, part_step, k, centers, None, K, C, BLOCK_C, PARTS, WIDE, ACC,
                    INTERPRET,
                )  # fmt: skip
                slope = rounded(_energy_gradient(energy, log_sum, mean, k, label, THRESHOLD, K), operand, INTERPRET)
            mu = tl.load(scaled + k[None, :] * C + c[:, None], mask=(k < K)[None, :] & (c < C)[:, None], other=0.0)
            acc = dot(mu, slope, acc, INTERPRET)
        gradient = acc * of_c2p
        difference = _load(x, rows, inside, c, x_strides, C, WIDE).to(ACC) - _own(centers, label, c, C)
        sign = tl.where(difference > 0, of_intra, tl.where(difference < 0, -of_intra, difference * of_intra))
        gradient += tl.where((label >= 0)[None, :], sign, 0.0)
        if grad_sums is not None:
            gradient += _own(grad_sums + image * grad_sums_step, label, c, C)
        columns = (c.to(tl.int64) if WIDE else c) * grad_strides[1]
        to = grad_x + columns[:, None] + grad_rows[None, :]
        tl.store(to, gradient.to(grad_x.dtype.element_ty), mask=(c < C)[:, None] & inside[None, :])


def forward(
    intra: Tensor,
    c2p: Tensor,
    lse: Tensor,
    inner: Tensor,
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    ignore_index: int,
    c2p_threshold: float,
    mask_ignored_c2p: bool,
) -> None:
    """Writes the first four; labels are not checked."""
    if not features.numel():
        intra.zero_()
        c2p.zero_()
        return
    launch = _plan_forward(lse, inner, features, labels, centers, ignore_index, c2p_threshold, mask_ignored_c2p)
    launch.run()
    for out, part in zip((intra, c2p), launch.args["parts"], strict=True):
        out.copy_(part.double().sum())


def backward(
    grad_features: Tensor,
    grad_intra: Tensor,
    grad_c2p: Tensor,
    grad_sums: Tensor | None,
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    lse: Tensor,
    inner: Tensor,
    ignore_index: int,
    c2p_threshold: float,
) -> None:
    """Writes grad_features."""
    if grad_features.numel():
        _plan_backward(
            grad_features, grad_intra, grad_c2p, grad_sums, features, labels, centers, lse, inner, ignore_index,
            c2p_threshold,
        ).run()  # fmt: skip


def _parts_of(scaled: Tensor, count: int) -> Tensor:
    """[count, ...] bfloat16 numbers that add up to ``scaled``, 8 bits each."""
    parts = []
    for _ in range(count):
        parts.append(scaled.to(torch.bfloat16))
        scaled = scaled - parts[-1]
    return torch.stack(parts)


def _common(
    features: Tensor, labels: Tensor, centers: Tensor, ignore_index: int, c2p_threshold: float, parts: int
) -> dict[str, Any]:
    _, c, height, width = features.shape
    classes = centers.shape[-2]
    half, small = features.dtype == torch.bfloat16, features.dtype == torch.float64
    scaled = centers * c**-0.5
    block_p = 16 if small else 32
    block_k = min(max(triton.next_power_of_2(classes), 16), 16 if small else 256)
    if classes > block_k and not small:
        block_k = 64  # and many channels at a time: what backward computes again is then little
    return {
        "x": features,
        "labels": labels,
        "centers": centers,
        "scaled": _parts_of(scaled, parts) if half else scaled,
        "x_strides": features.stride(),
        "label_strides": labels.stride(),
        "pixels": height * width,
        "width": width,
        "tiles": triton.cdiv(height * width, block_p),
        "ignore_index": ignore_index,
        "centers_step": centers.stride(0) if centers.dim() == 3 else 0,
        "part_step": centers.numel(),
        "THRESHOLD": c2p_threshold / (classes - 1),
        "K": classes,
        "C": c,
        "BLOCK_K": block_k,
        "BLOCK_P": block_p,
        "BLOCK_C": min(max(triton.next_power_of_2(c), 16), 32 if half else 16),
        "PARTS": parts if half else 1,
        "FLAT": flat(features),
        "WIDE": wide(features, labels),
        "ACC": tl.float64 if small else tl.float32,
        "INTERPRET": triton.knobs.runtime.interpret,
    }


def _plan_forward(lse, inner, features, labels, centers, ignore_index, c2p_threshold, mask_ignored_c2p) -> Launch:
    args = _common(features, labels, centers, ignore_index, c2p_threshold, 3)
    programs = features.shape[0] * args["tiles"]
    own = centers.square().sum(-1) * features.shape[1] ** -0.5
    args |= {"parts": lse.new_empty(2, programs), "lse": lse, "inner": inner, "own": own}
    args |= {
        "own_step": own.stride(0) if own.dim() == 2 else 0,
        "MASK": mask_ignored_c2p,
        "LOW": 1e-7,
        "HIGH": 1 - 1e-7,
    }
    return Launch(_forward, (programs,), args, 8 if args["K"] > 64 else 4, 2)


def _plan_backward(
    grad_features, grad_intra, grad_c2p, grad_sums, features, labels, centers, lse, inner, ignore_index, c2p_threshold
) -> Launch:
    args = _common(features, labels, centers, ignore_index, c2p_threshold, 2)
    args |= {"grad_x": grad_features, "grad_intra": grad_intra, "grad_c2p": grad_c2p, "grad_sums": grad_sums}
    args |= {"lse": lse, "inner": inner, "grad_strides": grad_features.stride(), "GRAD_FLAT": flat(grad_features)}
    args["grad_sums_step"] = grad_sums.stride(0) if grad_sums is not None and grad_sums.dim() == 3 else 0
    args["WIDE"] = args["WIDE"] or wide(grad_features)
    args["BLOCK_OUT"] = args["BLOCK_C"]
    if args["K"] > args["BLOCK_K"] and args["ACC"] == tl.float32:
        args["BLOCK_OUT"] = min(max(triton.next_power_of_2(args["C"]), 16), 8 * args["BLOCK_C"])
    return Launch(_backward, (features.shape[0] * args["tiles"],), args, 8 if args["K"] > 64 else 4, 2)


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named car_losses/kernel/dtype/layout/classes."""
    cases = []
    for dtype, name, layout, classes in (
        (torch.bfloat16, "bf16", "channels_last", 150),
        (torch.bfloat16, "bf16", "contiguous", 60),
        (torch.bfloat16, "bf16", "channels_last", 847),
        (torch.float32, "fp32", "contiguous", 150),
        (torch.float32, "fp32", "contiguous", 847),
    ):
        features = torch.empty(8, 512, 64, 64, dtype=dtype, device="meta")
        if layout == "channels_last":
            features = features.to(memory_format=torch.channels_last)
        labels = torch.empty(8, 64, 64, dtype=torch.uint8 if classes < 256 else torch.int16, device="meta")
        lse, centers = (torch.empty(shape, device="meta") for shape in ((8, 64, 64), (classes, 512)))
        given = features, labels, centers
        ending = f"{name}/{layout}/k{classes}"
        launch = _plan_forward(lse, lse, *given, 255, 0.25, False)
        cases.append((f"car_losses/forward/{ending}", launch))
        scalar = torch.empty((), device="meta")
        launch = _plan_backward(features, scalar, scalar, centers, *given, lse, lse, 255, 0.25)
        cases.append((f"car_losses/backward/{ending}", launch))
    return cases
