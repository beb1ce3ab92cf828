"""Axial attention: along a pixel's column ("h", over the height), its row ("w", over the width), or both.

A_h(y, x; j) = softmax_j scale * <query(y, x), key(j, x)>
A_w(y, x; j) = softmax_j scale * <query(y, x), key(y, j)>

compose  out = A_w (A_h value) for axes "hw": both maps from the given query and key (HFGD, CAA)
sum      out = A_h value + A_w value
joint    one softmax over column and row together, the pixel itself once (CCNet)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._sample import Sample

__all__ = ["axial_attention", "sample_inputs"]

SCORES = {"h": "nmcyx,nmcjx->nmyxj", "w": "nmcyx,nmcyj->nmyxj"}  # m: heads, j: along the axis
MIX = {"h": "nmyxj,nmcjx->nmcyx", "w": "nmyxj,nmcyj->nmcyx"}


def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    scale: float,
    combine: str,
    axes: str,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [N, heads * d_v, H, W]; and, without gradients, what a backward reads: the first axis's result where
    the second one reads it (compose, ``training``; else [0]), and the log-sum-exps [N, heads, softmaxes, H, W]."""
    q, k, v = (x.unflatten(1, (num_heads, x.shape[1] // num_heads)) for x in (query, key, value))
    first = query.new_empty(0)
    scores = [torch.einsum(SCORES[axis], q, k) * scale for axis in axes]
    if combine == "joint":
        itself = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)[:, None]
        joined = torch.cat([scores[0].masked_fill(itself, -torch.inf), scores[1]], -1)
        column, row = joined.softmax(-1).split([query.shape[2], query.shape[3]], -1)
        out = torch.einsum(MIX["h"], column, v) + torch.einsum(MIX["w"], row, v)
        scores = [joined]
    else:
        maps = [s.softmax(-1) for s in scores]
        out = torch.einsum(MIX[axes[0]], maps[0], v)
        if len(axes) == 2 and combine == "sum":
            out = out + torch.einsum(MIX[axes[1]], maps[1], v)
        elif len(axes) == 2:
            first = out.detach().flatten(1, 2) if training else first
            out = torch.einsum(MIX[axes[1]], maps[1], out)
    lse = torch.stack([s.detach().logsumexp(-1) for s in scores], 2)
    return out.flatten(1, 2), first, lse if lse.dtype == torch.float64 else lse.float()


def _sample(name: str, shape: tuple[int, int, int, int], d_v: int = 0, tiny: bool = False, **kwargs) -> Sample:
    n, c, h, w = shape
    value = (n, kwargs.get("num_heads", 1) * d_v if d_v else c, h, w)
    return Sample(name, {"query": shape, "key": shape, "value": value}, kwargs, tiny)


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, lines of one pixel, one past every block, widths that differ, one long line."""
    width, height = ("width",), ("height",)
    return [
        _sample("one_pixel", (1, 4, 1, 1), tiny=True, num_heads=2, scale=0.7),
        _sample("one_head", (1, 3, 2, 3), d_v=2, tiny=True, scale=0.6),
        _sample("prime_sizes", (2, 4, 3, 5), tiny=True, num_heads=2),
        _sample("width_first", (1, 4, 3, 2), d_v=3, tiny=True, num_heads=2, order=("width", "height"), scale=0.8),
        _sample("sum", (1, 4, 3, 4), d_v=1, tiny=True, num_heads=2, combine="sum", scale=0.8),
        _sample("joint", (2, 3, 3, 4), d_v=5, tiny=True, combine="joint"),
        _sample("joint_one_row", (1, 4, 1, 5), d_v=2, tiny=True, num_heads=2, combine="joint", scale=0.9),
        _sample("height_past_blocks", (1, 3, 35, 1), d_v=4, tiny=True, order=height),
        _sample("width_past_blocks", (1, 33, 1, 34), d_v=37, tiny=True, order=width, combine="sum", scale=0.06),
        _sample("one_past_vectors", (1, 34, 33, 17), d_v=17, num_heads=2),
        _sample("one_past_blocks", (1, 32, 65, 129), num_heads=2),
        _sample("joint_wide_values", (1, 24, 19, 35), d_v=150, combine="joint", scale=0.3),
        _sample("sum_width_first", (2, 48, 13, 23), num_heads=3, combine="sum", order=("width", "height")),
        _sample("one_long_row", (1, 16, 1, 1031), d_v=140, order=width, scale=0.4),
        _sample("long_rows", (1, 16, 2, 530), d_v=9, scale=0.4),
    ]
