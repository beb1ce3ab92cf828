"""Axial attention against scaled_dot_product_attention per axis, and criss-cross attention against its composition.

python -m pytest benchmarks/bench_axial_attention.py --benchmark-json=raw.json
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from _peaks import Work
from _suite import FORWARD, TRAINING, Function, Rival, Row, Suite, Unavailable
from torch import Tensor

import segops
from segops import _dispatch, _native
from segops.reference._sample import Sample

FP32, BF16 = torch.float32, torch.bfloat16
BOTH = ("nchw", "channels_last")


def _case(name: str, n: int, d: int, d_v: int, h: int, w: int, heads: int, **kwargs) -> Sample:
    query, value = (n, heads * d, h, w), (n, heads * d_v, h, w)
    return Sample(name, {"query": query, "key": query, "value": value}, {"num_heads": heads, **kwargs})


AXIAL_128 = _case("axial_128", 2, 32, 32, 128, 128, 8)
AXIAL_256 = _case("axial_256", 2, 32, 32, 256, 256, 8)
HFGD_129 = _case("hfgd_129", 1, 64, 64, 129, 129, 4)  # HFGD at stride 4 of 513 x 513
CRISS_CROSS = _case("criss_cross_97", 1, 64, 512, 97, 97, 1, combine="joint", scale=1.0)
CAE = _case("self_attention_4096", 1, 64, 512, 1, 4096, 1, order=("width",), scale=1.0)

# Times faster, forward and forward + backward.
GATES = {AXIAL_128.name: ("sdpa", 3.0, 2.5), AXIAL_256.name: ("sdpa", 3.0, 2.0), CRISS_CROSS.name: ("eager", 3.0, 3.0)}


def rows(device: str) -> list[Row]:
    found = []
    for sample in (AXIAL_128, AXIAL_256, HFGD_129, CRISS_CROSS, CAE):
        joint = sample is CRISS_CROSS
        for direction in (FORWARD, TRAINING):
            rival, forward, training = GATES.get(sample.name, ("", 0.0, 0.0))
            gates = {rival: forward if direction == FORWARD else training} if rival and device == "cpu" else {}
            for layout in BOTH if sample is not CAE else ("nchw",):
                rivals = ("eager",) if joint else ("sdpa",)
                if layout == "nchw" and sample in (AXIAL_128, CRISS_CROSS):
                    rivals += ("compile",)
                row = Row(sample, FP32, layout, direction, device, rivals=rivals, gates=gates)
                found.append(replace(row, rival_memory=direction == FORWARD and layout == "nchw"))
            if sample in (AXIAL_128, CRISS_CROSS):
                found.append(Row(sample, BF16, "nchw", direction, device, rivals=("eager",) if joint else ("sdpa",)))
    if device == "cpu" and _native.why_not("_C") is None and _native.cpu_isa() == "avx512":
        found += [
            Row(AXIAL_128, FP32, "nchw", direction, rivals=("sdpa",), isa="avx2") for direction in (FORWARD, TRAINING)
        ]
    return found


def sdpa(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """One axis after the other, heads and lines in the batch: the copies are scaled_dot_product_attention's own."""
    if sample.kwargs.get("combine") == "joint":
        raise Unavailable("one softmax over column and row is no attention along an axis")
    heads, scale = sample.kwargs["num_heads"], sample.kwargs.get("scale")
    turns = {"height": ((0, 4, 1, 3, 2), (0, 2, 4, 3, 1)), "width": ((0, 3, 1, 4, 2), (0, 2, 4, 1, 3))}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for axis in sample.kwargs.get("order", ("height", "width")):
            there, back = turns[axis]
            q, k, v = (
                x.unflatten(1, (heads, -1)).permute(there).flatten(0, 1).contiguous() for x in (query, key, value)
            )
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
            value = out.unflatten(0, (query.shape[0], -1)).permute(back).flatten(1, 2)
        return value

    return run


def criss_cross(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    """CCNet's: products per column and per row, concatenated, one softmax, products again."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        height = query.shape[2]
        itself = torch.eye(height, dtype=torch.bool, device=query.device)[:, None, :]
        column = torch.einsum("nchw,ncgw->nhwg", query, key).masked_fill(itself, -torch.inf)
        row = torch.einsum("nchw,nchv->nhwv", query, key)
        attention = torch.cat([column, row], 3).softmax(3)
        out = torch.einsum("nhwg,ncgw->nchw", attention[..., :height], value)
        return out + torch.einsum("nhwv,nchv->nchw", attention[..., height:], value)

    return run


def compiled(sample: Sample, dtype: torch.dtype, device: str, direction: str) -> Function:
    eager = criss_cross if sample.kwargs.get("combine") == "joint" else sdpa
    return torch.compile(eager(sample, dtype, device, direction), dynamic=False)


def work(sample: Sample, dtype: torch.dtype, direction: str) -> list[Work]:
    """Forward reads q, k, v, and writes out and the log-sum-exps; 10 flops per score and channel in the backward, of
    which 4 are the forward's again."""
    q, v = sample.shapes["query"], sample.shapes["value"]
    kwargs = {"combine": "compose", "order": ("height", "width")} | sample.kwargs
    axes = "".join(axis[0] for axis in kwargs["order"])
    flops = _dispatch.OPS["axial_attention"].flops(q, q, v, kwargs["num_heads"], 1.0, kwargs["combine"], axes)
    n, c, h, w = q
    pixels, lengths = n * h * w, sum({"h": h, "w": w}[axis] for axis in axes)
    scores = pixels * kwargs["num_heads"] * lengths
    statistic = pixels * kwargs["num_heads"] * (1 if kwargs["combine"] == "joint" else len(axes)) * 4
    forward = Work(pixels * (2 * c + 2 * v[1]) * dtype.itemsize + statistic, flops, scores)
    backward = Work(2 * forward.bytes, 5 * flops // 2, scores)
    return [forward] if direction == FORWARD else [forward, backward]


def extra_memory(sample: Sample, dtype: torch.dtype) -> int:
    """A tenth of inputs and output; of one long row, the packed line of every thread."""
    (n, c, h, w), v = sample.shapes["query"], sample.shapes["value"]
    tensors = n * h * w * (2 * c + 2 * v[1]) * dtype.itemsize
    return 2 * tensors if sample is CAE else tensors // 10


def tiny(sample: Sample) -> Sample:
    def cut(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, shape[1], min(shape[2], 16), min(shape[3], 16))

    return replace(sample, shapes={name: cut(shape) for name, shape in sample.shapes.items()})


def smaller(sample: Sample) -> Sample:
    """The float64 oracle's maps are of 256 x 256 x 256 scores per head and image otherwise."""
    if sample is not AXIAL_256:
        return sample
    return replace(sample, shapes={name: (1, 64, 256, 256) for name in sample.shapes}, kwargs={"num_heads": 2})


SUITE = Suite(
    op="axial_attention",
    function=segops.axial_attention,
    rows=rows,
    work=work,
    extra_memory=extra_memory,
    rivals=(
        Rival("sdpa", sdpa, layouts=BOTH),
        Rival("eager", criss_cross, layouts=BOTH),
        Rival("compile", compiled, compiled=True),
    ),
    tiny=tiny,
    checked=smaller,
)


def test_axial_attention(row, measure):
    measure(SUITE, row)
