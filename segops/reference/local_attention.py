"""Dilated local attention (GALD, LDv2): every pixel attends to kernel_size taps, dilation apart, around itself.

    S(p, n) = scale * <query(p), key(p + offset_n)>
    out(p)  = sum_n softmax_n(S(p, .)) value(p + offset_n)
    lse(p)  = log sum_n exp S(p, n)

offset_n runs over dilation * (i - kernel_size // 2) per axis. What stands outside the map is decided by ``border``:
``"zero"`` a tap with logit 0 and value 0, ``"mask"`` no tap, ``"shift"`` the tap that a window pushed back inside the
map has instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._sample import Sample

__all__ = ["local_attention", "sample_inputs"]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    num_heads: int,
    scale: float,
    border: str,
) -> tuple[Tensor, Tensor]:
    """Returns out [N, heads * d_v, H, W] and lse [N, heads, H, W]."""
    n, c, h, w = query.shape
    q = query.reshape(n, num_heads, c // num_heads, 1, h, w)
    k = _taps(key, kernel_size, dilation, border).unflatten(1, (num_heads, c // num_heads))
    v = _taps(value, kernel_size, dilation, border).unflatten(1, (num_heads, value.shape[1] // num_heads))
    scores = (q * k).sum(2) * scale  # [N, heads, taps, H, W]
    if border == "mask":
        inside = _taps(query.new_ones(1, 1, h, w), kernel_size, dilation, "zero")
        scores = scores.masked_fill(inside == 0, -torch.inf)
    lse = torch.logsumexp(scores, 2)
    attention = torch.exp(scores - lse.unsqueeze(2))
    out = (attention.unsqueeze(2) * v).sum(3)
    return out.flatten(1, 2), lse if lse.dtype == torch.float64 else lse.float()


def _taps(x: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int], border: str) -> Tensor:
    """[N, C, H, W] -> [N, C, taps, H, W], the taps in row-major order."""
    n, c, h, w = x.shape
    pad_h, pad_w = (d * (k // 2) for k, d in zip(kernel_size, dilation, strict=True))
    if border == "shift":
        # A window pushed back inside the map sees, in place of each tap that fell outside, the position kernel_size *
        # dilation further in: the same set of taps as the clamped window of semantics.md 1.3, hence the same softmax.
        padded = x[:, :, _wrapped(h, pad_h, kernel_size[0] * dilation[0], x.device)]
        padded = padded[:, :, :, _wrapped(w, pad_w, kernel_size[1] * dilation[1], x.device)]
    else:
        padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    return F.unfold(padded, kernel_size, dilation).view(n, c, kernel_size[0] * kernel_size[1], h, w)


def _wrapped(length: int, pad: int, period: int, device: torch.device) -> Tensor:
    position = torch.arange(-pad, length + pad, device=device)
    position = torch.where(position < 0, position + period, position)
    return torch.where(position >= length, position - period, position)


def _sample(name: str, shape: tuple[int, int, int, int], d_v: int = 0, tiny: bool = False, **kwargs) -> Sample:
    n, c, h, w = shape
    value = (n, kwargs.get("num_heads", 1) * d_v if d_v else c, h, w)
    kwargs.setdefault("return_lse", True)
    return Sample(name, {"query": shape, "key": shape, "value": value}, kwargs, tiny)


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, maps smaller than the window, one past every block size, widths that differ."""
    return [
        _sample("one_pixel", (2, 3, 1, 1), tiny=True, kernel_size=3, dilation=2, num_heads=3, scale=0.7),
        _sample(
            "prime_sizes", (2, 6, 5, 7), tiny=True, kernel_size=3, dilation=2, num_heads=2, scale=0.6, return_lse=False
        ),
        _sample("smaller_than_window", (1, 4, 3, 5), tiny=True, kernel_size=(5, 7), dilation=(3, 2), scale=0.9),
        _sample("value_wider", (2, 4, 4, 6), d_v=5, tiny=True, kernel_size=3, num_heads=2, dilation=(1, 2)),
        _sample("value_narrower", (1, 6, 6, 3), d_v=1, tiny=True, kernel_size=(3, 1), num_heads=2, dilation=(2, 3)),
        _sample("mask", (2, 4, 6, 5), tiny=True, kernel_size=3, dilation=2, num_heads=2, scale=0.8, border="mask"),
        _sample("mask_tall_window", (1, 3, 2, 9), d_v=2, tiny=True, kernel_size=(7, 3), dilation=(2, 4), border="mask"),
        _sample("shift", (1, 4, 7, 9), tiny=True, kernel_size=3, dilation=(2, 3), num_heads=2, border="shift"),
        _sample("shift_exact_fit", (1, 2, 6, 10), d_v=3, tiny=True, kernel_size=(3, 5), dilation=2, border="shift"),
        _sample("dilation_past_16", (1, 2, 2, 37), tiny=True, kernel_size=(1, 3), dilation=(1, 18), border="mask"),
        _sample("one_tap", (2, 3, 4, 5), tiny=True, kernel_size=1, dilation=4, scale=0.5),
        _sample("one_past_blocks", (1, 34, 5, 65), d_v=33, kernel_size=3, dilation=2, num_heads=1),
        _sample("ldv2", (2, 64, 23, 29), kernel_size=5, dilation=6, num_heads=2, scale=1.0),
        _sample("ldv2_mask", (1, 40, 19, 33), kernel_size=5, dilation=3, num_heads=5, border="mask"),
        _sample("wide_kernel_shift", (1, 16, 31, 40), kernel_size=(9, 11), dilation=(3, 2), border="shift"),
        _sample("long_row", (1, 8, 3, 301), kernel_size=(3, 7), dilation=(1, 6), num_heads=1),
    ]
