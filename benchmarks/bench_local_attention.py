"""Dilated local attention against what a user would otherwise run.

python -m pytest benchmarks/bench_local_attention.py --benchmark-json=local_attention.json
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from _peaks import Work
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite, Unavailable
from torch import Tensor

import segops
from segops import _native
from segops.reference._sample import Sample
from segops.reference.local_attention import local_attention as reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _case(name: str, n: int, c: int, h: int, w: int, kernel_size: int, dilation: int, heads: int, **kwargs) -> Sample:
    shapes = dict.fromkeys(("query", "key", "value"), (n, c, h, w))
    return Sample(name, shapes, dict(kernel_size=kernel_size, dilation=dilation, num_heads=heads, **kwargs))


LDV2 = _case("ldv2_128", 2, 256, 128, 128, 5, 6, 8)
LDV2_MASK = _case("ldv2_128_mask", 2, 256, 128, 128, 5, 6, 8, border="mask")
LDV2_SHIFT = _case("ldv2_128_shift", 2, 256, 128, 128, 5, 6, 8, border="shift")
GALD_K5 = _case("gald_97_k5", 2, 64, 97, 97, 5, 3, 1)
GALD_K5_SHIFT = _case("gald_97_k5_shift", 2, 64, 97, 97, 5, 3, 1, border="shift")
GALD_K7 = _case("gald_97_k7", 2, 64, 97, 97, 7, 6, 1)
GALD_512 = _case("gald_512", 1, 512, 97, 97, 5, 6, 1)  # GALD's own width, one head
SCALING = [_case(f"scaling_{s}", 1, 256, s, s, 5, 6, 8) for s in (64, 96, 128, 192, 256, 384, 512)]


# Times faster than F.unfold, and percent of the floor, on the CPU.
GATES = {
    (LDV2.name, FORWARD): {"unfold": 60, "floor": 15},
    (LDV2.name, TRAINING): {"unfold": 40, "floor": 15},
    **{(sample.name, direction): {"unfold": 30} for sample in (GALD_K5, GALD_K7) for direction in (FORWARD, TRAINING)},
}


def rows(device: str) -> list[Row]:
    """Every case in both layouts. The rivals that compile would take too long to stand beside every row."""
    found = []
    for sample in (LDV2, GALD_K5, GALD_K7, GALD_512):
        for dtype in (FP32, BF16, FP16) if sample is LDV2 and device == "cpu" else (FP32, BF16):
            for direction in (FORWARD, TRAINING):
                gates = GATES.get((sample.name, direction), {}) if dtype == FP32 and device == "cpu" else {}
                # Better plain PyTorch than F.unfold is so in the forward only.
                eager = ("unfold", "eager") if dtype == FP32 and direction == FORWARD else ("unfold",)
                full = (*eager, "compile", "flex") if dtype == FP32 or device == "cuda" else eager
                memory = dtype == FP32 and direction == FORWARD
                found.append(
                    Row(sample, dtype, "nchw", direction, device, rivals=full, rival_memory=memory, gates=gates)
                )
                found.append(Row(sample, dtype, "channels_last", direction, device, rivals=eager, gates=gates))
    for sample in (LDV2_MASK, LDV2_SHIFT, GALD_K5_SHIFT):
        rivals = ("unfold", "compile", "flex") + (("natten",) if sample.kwargs["border"] == "shift" else ())
        found.append(Row(sample, FP32, "nchw", FORWARD, device, rivals=rivals, rival_memory=True))
    for sample in SCALING:
        rivals = ("unfold", "eager", "compile", "flex")
        found.append(Row(sample, FP32, "nchw", FORWARD, device, rivals=rivals, rival_memory=True, series="scaling"))
    if device == "cuda":
        return [replace(row, backend=backend) for row in found for backend in ("triton", "cuda")]
    if _native.why_not("_C") is None and _native.cpu_isa() == "avx512":
        found += [
            Row(LDV2, FP32, "nchw", direction, rivals=("unfold",), isa="avx2") for direction in (FORWARD, TRAINING)
        ]
    return found


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """Forward reads q, k, v and writes out and the log-sum-exp; 4 flops per score and channel, 10 in the backward."""
    n, c, h, w = sample.shapes["query"]
    taps, heads = sample.kwargs["kernel_size"] ** 2, sample.kwargs["num_heads"]
    tensor, statistic = n * c * h * w * dtype.itemsize, n * heads * h * w * 4
    scores = n * heads * h * w * taps
    forward = Work(4 * tensor + statistic, 4 * n * c * h * w * taps, scores)
    backward = Work(2 * forward.bytes, 10 * n * c * h * w * taps, scores)
    return [forward] if direction == FORWARD else [forward, backward]


def extra_memory(sample: Sample, dtype: torch.dtype) -> int:
    """The log-sum-exp and 5 % of q + k + v + out."""
    n, c, h, w = sample.shapes["query"]
    return n * sample.kwargs["num_heads"] * h * w * 4 + int(0.05 * 4 * n * c * h * w * dtype.itemsize)


def tiny(sample: Sample) -> Sample:
    """A sixteenth of the map, though no smaller than the window of border="shift"."""
    n, c, h, w = sample.shapes["query"]
    least = sample.kwargs["kernel_size"] * sample.kwargs["dilation"]
    shape = (n, c, min(h, max(h // 4, least)), min(w, max(w // 4, least)))
    return replace(sample, shapes=dict.fromkeys(sample.shapes, shape))


def first_head(tensors: dict[str, Tensor], kwargs: dict) -> tuple[dict[str, Tensor], dict]:
    heads = kwargs["num_heads"]
    return {name: x[:, : x.shape[1] // heads] for name, x in tensors.items()}, {**kwargs, "num_heads": 1}


def _scale(sample: Sample) -> float:
    return (sample.shapes["query"][1] // sample.kwargs["num_heads"]) ** -0.5


def _border(sample: Sample) -> str:
    return sample.kwargs.get("border", "zero")


def unfold(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """segops.reference: F.unfold of K and V, then products and sums."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kernel_size, dilation, heads = (sample.kwargs[name] for name in ("kernel_size", "dilation", "num_heads"))
        out, _ = reference(
            query, key, value, (kernel_size,) * 2, (dilation,) * 2, heads, _scale(sample), _border(sample)
        )
        return out

    return run


def windows(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """Sliding windows as a view of the padded map; one strided read per tap, the taps last."""
    if _border(sample) != "zero":
        raise Unavailable("this formulation has zero padding only")
    kernel_size, dilation, heads = (sample.kwargs[name] for name in ("kernel_size", "dilation", "num_heads"))
    span, scale = dilation * (kernel_size - 1) + 1, _scale(sample)

    def taps(x: Tensor) -> Tensor:
        x = F.pad(x, (span // 2,) * 4).unfold(2, span, 1)[..., ::dilation].unfold(3, span, 1)[..., ::dilation]
        return x.flatten(4).unflatten(1, (heads, -1))  # [N, heads, d, H, W, taps]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query.unflatten(1, (heads, -1)).unsqueeze(-1) * taps(key)).sum(2) * scale
        return (scores.softmax(-1).unsqueeze(2) * taps(value)).sum(-1).flatten(1, 2)

    return run


def pixel_matmul(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """Unfolded per pixel, channels last: two batched matrix products [taps, d] x [d, 1]."""
    if _border(sample) != "zero":
        raise Unavailable("this formulation has zero padding only")
    kernel_size, dilation, heads = (sample.kwargs[name] for name in ("kernel_size", "dilation", "num_heads"))
    span, scale = dilation * (kernel_size - 1) + 1, _scale(sample)

    def taps(x: Tensor) -> Tensor:
        x = F.pad(x, (span // 2,) * 4).unfold(2, span, 1)[..., ::dilation].unfold(3, span, 1)[..., ::dilation]
        return x.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 5, 6, 2).flatten(4, 5)  # [N, H, W, heads, taps, d]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = query.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2).unsqueeze(-1)
        attention = (taps(key) @ q * scale).softmax(-2)
        return (attention.transpose(-1, -2) @ taps(value)).squeeze(-2).permute(0, 3, 4, 1, 2).flatten(1, 2)

    return run


def slices(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """One shifted slice of the padded map per tap: much code, no unfolded copy once it is fused."""
    if _border(sample) != "zero":
        raise Unavailable("this formulation has zero padding only")
    kernel_size, dilation, heads = (sample.kwargs[name] for name in ("kernel_size", "dilation", "num_heads"))
    reach, scale = dilation * (kernel_size // 2), _scale(sample)

    def taps(x: Tensor) -> list[Tensor]:
        h, w = x.shape[2:]
        x = F.pad(x, (reach,) * 4).unflatten(1, (heads, -1))
        steps = range(0, dilation * kernel_size, dilation)
        return [x[..., y : y + h, z : z + w] for y in steps for z in steps]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = query.unflatten(1, (heads, -1)) * scale
        attention = torch.stack([(q * k).sum(2, keepdim=True) for k in taps(key)]).softmax(0)
        return sum(a * v for a, v in zip(attention, taps(value), strict=True)).flatten(1, 2)

    return run


def compiled(formulation: Callable[..., Function], directions: tuple[str, ...]) -> Callable[..., Function]:
    def prepare(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
        if direction not in directions:
            raise Unavailable("another formulation is faster once compiled")
        return torch.compile(formulation(sample, dtype, device, direction), dynamic=False)

    return prepare


def flex(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """FlexAttention with the neighbourhood as a mask, pixels in natural order, the block mask made beforehand.

    The padded taps of border="zero" have logit 0 and value 0: one more key whose logit is log(number of padded taps)
    and whose value is 0. (Its log-sum-exp would serve as well, but return_lse does not compile on the CPU.)
    """
    if device == "cpu" and direction != FORWARD:
        raise Unavailable("FlexAttention has no backward on the CPU (NotImplementedError)")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    n, c, h, w = sample.shapes["query"]
    kernel_size, dilation, heads = (sample.kwargs[name] for name in ("kernel_size", "dilation", "num_heads"))
    block, pixels, border = 128, h * w, _border(sample)
    sink = border == "zero"
    ys, xs = (_positions(length, kernel_size, dilation, border, device) for length in (h, w))
    inside = ((ys >= 0) & (ys < h))[:, None, :, None] & ((xs >= 0) & (xs < w))[None, :, None, :]
    inside = inside.flatten(0, 1)  # [pixels, kernel_h, kernel_w]
    keys = (ys[:, None, :, None] * w + xs[None, :, None, :]).flatten(0, 1)
    padded = (~inside).sum((1, 2))
    blocks = torch.arange(pixels, device=device) // block
    touched = torch.zeros(pixels // block + 1, pixels // block + 1, dtype=torch.bool, device=device)
    touched[blocks[:, None, None].expand_as(keys)[inside], keys[inside] // block] = True
    if sink:
        touched[blocks[padded > 0], pixels // block] = True
    # Without the sink, or where H * W is a multiple of the block, the last row or column of blocks may not exist.
    touched = touched[: -(-pixels // block), : -(-(pixels + sink) // block)]
    log_padded = padded.to(torch.float32).log()

    def on_axis(at, other, length):  # arithmetic only: the CPU template takes no second captured tensor
        first = at // dilation - kernel_size // 2
        if border == "shift":
            phases = (length - at % dilation + dilation - 1) // dilation
            first = torch.minimum(torch.maximum(first, 0 * at), phases - kernel_size)
        step = other // dilation - first
        return (other % dilation == at % dilation) & (step >= 0) & (step < kernel_size)

    def neighbours(b, head, q, k):
        tap = on_axis(q // w, k // w, h) & on_axis(q % w, k % w, w)
        return (tap & (k < pixels)) | (k == pixels) if sink else tap

    def logits(score, b, head, q, k):
        return torch.where(k == pixels, log_padded[q], score)

    count = touched.sum(1, dtype=torch.int32)
    order = touched.int().argsort(dim=1, descending=True, stable=True).int()
    mask = BlockMask.from_kv_blocks(
        count[None, None], order[None, None], BLOCK_SIZE=block, mask_mod=neighbours, seq_lengths=(pixels, pixels + sink)
    )
    attention = torch.compile(flex_attention, dynamic=False)
    scale = _scale(sample)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = query.view(n, heads, -1, pixels).mT.contiguous()
        k, v = (F.pad(x.view(n, heads, -1, pixels), (0, int(sink))).mT.contiguous() for x in (key, value))
        out = attention(q, k, v, score_mod=logits if sink else None, block_mask=mask, scale=scale)
        return out.mT.reshape(n, c, h, w)

    return run


def _positions(length: int, kernel_size: int, dilation: int, border: str, device: str) -> Tensor:
    """[length, kernel_size]: where each tap of each position stands on one axis (semantics.md 1.3)."""
    at = torch.arange(length, device=device)
    start = at - dilation * (kernel_size // 2)
    if border == "shift":
        phase = at % dilation
        in_phase = (length - phase + dilation - 1) // dilation
        start = (at // dilation - kernel_size // 2).clamp(min=0).minimum(in_phase - kernel_size) * dilation + phase
    return start[:, None] + dilation * torch.arange(kernel_size, device=device)


def natten(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """NATTEN's own layout is heads last; on the CPU only its Flex path exists, uncompiled and without backward."""
    if device == "cpu" and direction != FORWARD:
        raise Unavailable("NATTEN has no backward on the CPU since 0.20")
    try:
        na2d = importlib.import_module("natten").na2d
    except ImportError as error:
        raise Unavailable(f"natten cannot be imported: {error}") from None
    kwargs = {name: sample.kwargs[name] for name in ("kernel_size", "dilation")} | {"scale": _scale(sample)}
    if device == "cpu":
        kwargs["backend"] = "flex-fna"
    heads = sample.kwargs["num_heads"]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.permute(0, 2, 3, 1).unflatten(3, (heads, -1)).contiguous() for x in (query, key, value))
        return na2d(q, k, v, **kwargs).flatten(3).permute(0, 3, 1, 2)

    return run


BOTH = ("nchw", "channels_last")
SUITE = Suite(
    op="local_attention",
    function=segops.local_attention,
    rows=rows,
    work=work,
    extra_memory=extra_memory,
    rivals=(
        Rival("unfold", unfold, "", BOTH),
        # Better plain PyTorch than F.unfold, for who takes the trouble.
        Rival("eager", windows, "windows", BOTH),
        Rival("eager", pixel_matmul, "matmul", BOTH),
        # The fastest formulations once compiled on the CPU; with the backward the others stay near eager.
        Rival("compile", compiled(unfold, (FORWARD,)), "unfold", compiled=True),
        Rival("compile", compiled(slices, (TRAINING,)), "slices", compiled=True),
        Rival("flex", flex, compiled=True),
        Rival("natten", natten, layouts=("channels_last",)),
    ),
    tiny=tiny,
    part=first_head,
)


def test_local_attention(row, measure):
    measure(SUITE, row)
