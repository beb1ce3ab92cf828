"""Dilated local attention (GALD, LDv2) in Triton, forward and backward.

    S(p, n) = scale * <query(p), key(p + offset_n)>          A(p, n) = exp(S(p, n) - lse(p))
    out(p)  = sum_n A(p, n) value(p + offset_n)              lse(p)  = log sum_n exp S(p, n)

    dS(p, n)      = A(p, n) * (<grad_out(p), value(p + offset_n)> - delta(p))
    delta(p)      = <grad_out(p), out(p)> - grad_lse(p)
    grad_query(p) = scale * sum_n dS(p, n) key(p + offset_n)
    grad_key(u)   = scale * sum_n dS(u - offset_n, n) query(u - offset_n)
    grad_value(u) = sum_n A(u - offset_n, n) grad_out(u - offset_n)

Layout: query, key [N, heads * d, H, W], value, out [N, heads * d_v, H, W], lse [N, heads, H, W], any strides.

The attention map and an unfolded key never exist; a gradient is a sum in a fixed order, without atomics. Channels-last
maps go through tiles of matrix products, a third to a seventh of a gather's instructions per pixel; float64, NCHW and
very large windows go through the gather: tiles take pixels a dilation apart, few of which share a sector in NCHW.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _local_attention_gather as _gather
from . import _local_attention_tiles as _tiles
from ._launch import Launch

__all__ = ["aot_cases", "backward", "forward"]

Size = tuple[int, int]


def forward(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size,
    num_heads: int,
    scale: float,
    border: str,
) -> None:
    """Writes out [N, heads * d_v, H, W] and lse [N, heads, H, W] (float32; float64 for float64)."""
    if out.numel():
        _plan_forward(out, lse, query, key, value, kernel_size, dilation, num_heads, scale, border).run()


def backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel_size: Size,
    dilation: Size,
    num_heads: int,
    scale: float,
    border: str,
) -> None:
    """Writes the gradients of query, key and value; ``grad_lse`` None is zero."""
    if out.numel():
        tensors = (grad_query, grad_key, grad_value, grad_out, grad_lse, query, key, value, out, lse)
        for launch in _plan_backward(*tensors, kernel_size, dilation, num_heads, scale, border):
            launch.run()


def _plan_forward(out, lse, query, key, value, *settings) -> Launch:
    maps = {"query": query, "key": key, "value": value, "out": out}
    return _plan("_forward", maps, {"lse": lse}, *settings)


def _plan_backward(
    grad_query, grad_key, grad_value, grad_out, grad_lse, query, key, value, out, lse, *settings
) -> list[Launch]:
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    maps = {"query": query, "key": key, "value": value, "grad_out": grad_out}
    rows = {"lse": lse, "delta": delta}
    to_query = {**maps, "grad_query": grad_query, "out": out}
    to_key_value = {**maps, "grad_key": grad_key, "grad_value": grad_value}
    return [
        _plan("_backward_query", to_query, {**rows, "grad_lse": grad_lse}, *settings),
        _plan("_backward_key_value", to_key_value, rows, *settings),
    ]


def _plan(
    kernel: str,
    maps: dict[str, Tensor],
    rows: dict[str, Tensor | None],
    kernel_size: Size,
    dilation: Size,
    num_heads: int,
    scale: float,
    border: str,
) -> Launch:
    """``maps`` are the tensors with channels, ``rows`` those with one number per head and pixel."""
    query, key, value = maps["query"], maps["key"], maps["value"]
    n, _, height, width = query.shape
    d, d_v, itemsize = query.shape[1] // num_heads, value.shape[1] // num_heads, query.element_size()
    tensors = {name: tensor for name, tensor in {**maps, **rows}.items() if tensor is not None}
    extents = [
        sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        for x in tensors.values()
    ]
    args: dict[str, Any] = {
        **maps,
        **rows,
        **{f"{name}_strides": (0, 0, 0, 0) if x is None else x.stride() for name, x in {**maps, **rows}.items()},
        "height": height,
        "width": width,
        "heads": num_heads,
        "dilation": dilation,
        "KERNEL_Y": kernel_size[0],
        "KERNEL_X": kernel_size[1],
        "D": d,
        "D_V": d_v,
        "SCALE": scale,
        "BORDER": border,
        # In elements: what every pixel's first channel is a multiple of, up to a load of 16 bytes.
        "ALIGN": math.gcd(16 // itemsize, *(x.stride(axis) for x in maps.values() for axis in (0, 2, 3))),
        # Offsets within one image are 32-bit where they can be.
        "WIDE": max(extents) >= 2**31,
    }
    channels_last = key.stride(1) == 1 and key.stride(3) != 1
    # No step is longer than the map: a phase beyond it would be a program without pixels.
    steps = (min(dilation[0], height), min(dilation[1], width) if channels_last else 1)
    config = tile_configuration(kernel, d, d_v, itemsize, kernel_size, border) if channels_last else None
    module: ModuleType = _tiles
    if config:
        side = (_tiles.SIDE.value, _tiles.SIDE.value)
        args["INTERPRET"] = triton.knobs.runtime.interpret
    else:
        module = _gather
        config = gather_configuration(kernel, d, d_v, itemsize, kernel_size, width, channels_last)
        side = (config["BLOCK_Y"], config["BLOCK_X"])
        args["ACC"] = tl.float64 if itemsize == 8 else tl.float32
    tiles = (triton.cdiv(height, steps[0] * side[0]), triton.cdiv(width, steps[1] * side[1]))
    args |= {"tiles": tiles, "steps": steps, **config}
    num_warps = args.pop("num_warps")
    programs = n * num_heads * config.get("slices", 1) * math.prod(tiles) * math.prod(steps)
    return Launch(getattr(module, kernel), (programs,), args, num_warps, num_stages=2)


def tile_configuration(
    kernel: str, d: int, d_v: int, itemsize: int, kernel_size: Size, border: str
) -> dict[str, int] | None:
    """Halo, channel blocks and warps of the kernels on tiles; None where the scores do not fit in registers.

    One warp where it can hold all scores: sums over taps then need no barrier. fp32 has no tensor core and unrolls its
    products, hence the narrower blocks.
    """
    # Windows pushed inside the map make a key visible from up to a window's width on either side.
    spread = 2 if border == "shift" and kernel == "_backward_key_value" else 1
    halo = [_tiles.SIDE.value + spread * (size - 1) for size in kernel_size]
    taps = max(triton.next_power_of_2(halo[0] * halo[1]), 16)
    if taps > 512 or itemsize == 8:
        return None
    narrow = max(d, d_v) <= 64
    one_warp = narrow and (itemsize == 2 or kernel == "_forward")
    widest = 64 if itemsize == 2 else 16 if narrow else 32
    block_d, block_v = (min(max(triton.next_power_of_2(width), 16), widest) for width in (d, d_v))
    return {
        "HALO_Y": halo[0],
        "HALO_X": halo[1],
        "TAPS": taps,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "num_warps": max(1 if one_warp else 4, taps // 64),
    }


def gather_configuration(
    kernel: str, d: int, d_v: int, itemsize: int, kernel_size: Size, width: int, channels_last: bool
) -> dict[str, int]:
    """Tile of pixels, channel blocks and warps.

    ``words`` counts the accumulators that one tile of pixels and channels takes per thread. With channels last a
    pixel's channels lie across the lanes, 16 bytes each, and never across warps, for their sums would go through shared
    memory. In NCHW the lanes lie across pixels and a thread holds a pixel's channels, shared among warps where many.
    """
    block_d, block_v = triton.next_power_of_2(d), triton.next_power_of_2(d_v)
    block = max(block_d, block_v)
    # Backward holds five or six such tiles at a time, forward three.
    words = 8 if channels_last else 32 if kernel == "_forward" else 16
    if itemsize == 8:
        words //= 2
    if channels_last:
        chunk = 512 // itemsize
        group = max(size for size in range(1, 8) if kernel_size[1] % size == 0)
        num_warps = 4 if block <= chunk else 1
        pixels = min(max(words * 32 * num_warps // block, 1), 256)
        block_y = 1 << (pixels.bit_length() - 1) // 2
        block_x = pixels // block_y
        most = 1024 * num_warps // pixels
    else:
        chunk, group = 64, 1
        block_x = min(32, triton.next_power_of_2(width))
        num_warps = min(max(block // words, 1), 16)
        block_y = max(4 // num_warps, 1) * (32 // block_x)
        num_warps = max(num_warps, 4)
        most = words * 32 * num_warps // (block_x * block_y)
    resident = block <= most
    slice_d, slice_v = min(block_d, most), min(block_v, most)
    config = {
        "GROUP": group,
        "BLOCK_Y": block_y,
        "BLOCK_X": block_x,
        "BLOCK_D": block_d if resident else min(block_d, chunk),
        "BLOCK_V": block_v if resident else min(block_v, chunk),
        "RESIDENT": resident,
        "num_warps": num_warps,
    }
    if kernel == "_forward":
        return config | {"SLICE_V": slice_v, "slices": triton.cdiv(d_v, slice_v)}
    if kernel == "_backward_query":
        return config | {"SLICE_D": slice_d, "slices": triton.cdiv(d, slice_d)}
    slices = max(triton.cdiv(d, slice_d), triton.cdiv(d_v, slice_v))
    return config | {"SLICE_D": slice_d, "SLICE_V": slice_v, "slices": slices}


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named local_attention/kernel/dtype/layout/head width/window/border.

    Shapes: GALD's 512 channels in one head and 256 channels in eight, at stride 8 of a 769 x 769 crop.
    """
    narrow = [(dtype, layout, 8, 32, 5, "zero") for dtype in _DTYPES for layout in ("nchw", "channels_last")]
    wide = [(dtype, layout, 1, 512, 5, "zero") for dtype in ("bf16", "fp32") for layout in ("nchw", "channels_last")]
    others = [("bf16", "channels_last", 8, 32, *rest) for rest in ((5, "mask"), (5, "shift"), (21, "zero"))]
    cases = []
    for dtype, layout, heads, d, window, border in narrow + wide + others:
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        x = torch.empty(2, heads * d, 97, 97, dtype=_DTYPES[dtype], device="meta").to(memory_format=memory_format)
        lse = torch.empty(2, heads, 97, 97, dtype=torch.float64 if dtype == "fp64" else torch.float32, device="meta")
        settings = ((window, window), (6, 6), heads, 1.0, border)
        launches = [
            _plan_forward(x, lse, x, x, x, *settings),
            *_plan_backward(x, x, x, x, lse, x, x, x, x, lse, *settings),
        ]
        for name, launch in zip(("forward", "backward_query", "backward_key_value"), launches, strict=True):
            cases.append((f"local_attention/{name}/{dtype}/{layout}/d{d}/k{window}/{border}", launch))
    return cases


_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
