"""Axial attention in Triton, forward and backward: one launch (backward: two) per axis.

    S(p, j) = scale * <query(p), key(j)>,  j on p's line           A(p, j) = exp(S(p, j) - lse(p))
    out(p)  = sum_j A(p, j) value(j)                               lse(p)  = log sum_j exp S(p, j)

    dS(p, j)      = A(p, j) * (<grad_out(p), value(j)> - delta(p)),  delta(p) = sum_j A(p, j) <grad_out(p), value(j)>
    grad_query(p) = scale * sum_j dS(p, j) key(j)
    grad_key(j)   = scale * sum_p dS(p, j) query(p)                grad_value(j) = sum_p A(p, j) grad_out(p)

Layout: query, key [N, heads * d, H, W], value, out [N, heads * d_v, H, W], lse [N, heads, softmaxes, H, W], any
strides, read in place: a line is a column or a row, and its pixels are the rows of every tile.

A program has a block of queries (or keys) of one line and one head, and walks the line's keys (queries) with a running
softmax; values wider than a block go to several programs, which compute the same scores. Composed, the second axis runs
on the first one's result. Joint, the row's launch merges the column's result and log-sum-exp with its own. Every
element is written by one program: no atomics. Where the result of one axis alone is not known (sum), or not well
enough (float16), delta takes a sweep of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import dot, rounded
from ._launch import Launch

__all__ = ["aot_cases", "backward", "forward"]

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e38)
LITTLE = 1 << 20  # elements, that are not worth a launch


@triton.jit
def _place(lines, heads, blocks, slices, LINES_FIRST: tl.constexpr):
    """This program's line, head, block of the line, slice of the channels and image."""
    # Neighbouring programs take what lies side by side in memory: the heads of a pixel, or the columns of a row.
    program = tl.program_id(0)
    if LINES_FIRST:
        line = program % lines
        program = program // lines
        head = program % heads
        program = program // heads
    else:
        head = program % heads
        program = program // heads
        line = program % lines
        program = program // lines
    block = program % blocks
    program = program // blocks
    return line.to(tl.int64), head.to(tl.int64), block, program % slices, (program // slices).to(tl.int64)


@triton.jit
def _line(tensor, strides, image, head, line, WIDTH: tl.constexpr):
    """First element of one line of one head."""
    return tensor + image * strides[0] + head * WIDTH * strides[1] + line * strides[2]


@triton.jit
def _at(start, strides, pixel, length, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to channels first .. first + BLOCK of the pixels, and their mask."""
    channel = first + tl.arange(0, BLOCK)
    mask = (pixel < length)[:, None] & (channel < WIDTH)[None, :]
    if WIDE:
        pixel = pixel.to(tl.int64)
        channel = channel.to(tl.int64)
    return start + (pixel * strides[3])[:, None] + (channel * strides[1])[None, :], mask


@triton.jit
def _load(start, strides, pixel, length, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    pointers, mask = _at(start, strides, pixel, length, first, WIDTH, BLOCK, WIDE)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _products(
    a, a_tile, a_strides, i, b, b_tile, b_strides, j, length,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """<a(i), b(j)> over the channels; the tiles hold the first block."""
    acc = dot(a_tile, tl.trans(b_tile), tl.zeros([i.shape[0], j.shape[0]], ACC), INTERPRET)
    for first in range(BLOCK, WIDTH, BLOCK):
        a_next = _load(a, a_strides, i, length, first, WIDTH, BLOCK, WIDE)
        b_next = _load(b, b_strides, j, length, first, WIDTH, BLOCK, WIDE)
        acc = dot(a_next, tl.trans(b_next), acc, INTERPRET)
    return acc


@triton.jit
def _store(
    start, strides, pixel, length, first, tile, ADD: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    pointers, mask = _at(start, strides, pixel, length, first, WIDTH, BLOCK, WIDE)
    if ADD:
        tile += tl.load(pointers, mask=mask, other=0.0).to(tile.dtype)
    tl.store(pointers, rounded(tile, start.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit
def _forward(
    out, lse, before, query, key, value, out_strides, lse_strides, before_strides, query_strides, key_strides,
    value_strides, lines, length, heads, blocks, slices, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr,
    SKIP: tl.constexpr, ADD: tl.constexpr, LINES_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``before``: the log-sum-exps of what out holds, to be merged with this axis's; None: none. ``ADD``: to out."""
    line, head, block, piece, image = _place(lines, heads, blocks, slices, LINES_FIRST)
    q = _line(query, query_strides, image, head, line, D)
    k = _line(key, key_strides, image, head, line, D)
    v = _line(value, value_strides, image, head, line, D_V)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_tile = _load(q, query_strides, i, length, 0, D, BLOCK_D, WIDE)
    top = tl.full([BLOCK_Q], _LOWEST, ACC)
    total = tl.zeros([BLOCK_Q], ACC)
    acc = tl.zeros([BLOCK_Q, BLOCK_V], ACC)
    for start in range(0, length, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k_tile = _load(k, key_strides, j, length, 0, D, BLOCK_D, WIDE)
        s = _products(q, q_tile, query_strides, i, k, k_tile, key_strides, j, length, D, BLOCK_D, WIDE, ACC, INTERPRET)
        seen = (j < length)[None, :]
        if SKIP:
            seen = seen & (i[:, None] != j[None, :])
        s = tl.where(seen, s * SCALE, -float("inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2((top - highest) * _LOG2E)
        weight = tl.exp2((s - highest[:, None]) * _LOG2E)
        total = total * shrink + tl.sum(weight, 1)
        v_tile = _load(v, value_strides, j, length, piece * BLOCK_V, D_V, BLOCK_V, WIDE)
        acc = dot(rounded(weight, v_tile.dtype, INTERPRET), v_tile, acc * shrink[:, None], INTERPRET)
        top = highest
    if SKIP:  # a column of one pixel has no other
        alone = total == 0
        total = tl.where(alone, 1.0, total)
        log_total = tl.where(alone, _LOWEST, top + tl.log(total))
    else:
        log_total = top + tl.log(total)
    result = acc / total[:, None]
    to = _line(out, out_strides, image, head, line, D_V)
    if before is not None:
        at = _line(before, before_strides, image, head, line, 1) + i * before_strides[3]
        old = tl.load(at, mask=i < length, other=0.0)
        highest = tl.maximum(old, log_total)
        both = highest + tl.log(tl.exp(old - highest) + tl.exp(log_total - highest))
        pointers, mask = _at(to, out_strides, i, length, piece * BLOCK_V, D_V, BLOCK_V, WIDE)
        held = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        result = result * tl.exp(log_total - both)[:, None] + held * tl.exp(old - both)[:, None]
        log_total = both
    _store(to, out_strides, i, length, piece * BLOCK_V, result, ADD, D_V, BLOCK_V, WIDE, INTERPRET)
    if piece == 0:
        at = _line(lse, lse_strides, image, head, line, 1) + i * lse_strides[3]
        tl.store(at, log_total, mask=i < length)


@triton.jit
def _backward_query(
    grad_query, delta, grad_out, query, key, value, out, lse, grad_query_strides, delta_strides, grad_out_strides,
    query_strides, key_strides, value_strides, out_strides, lse_strides, lines, length, heads, blocks, slices,
    D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr,
    DELTA: tl.constexpr, LINES_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_query; and delta, unless it is "given": from out, or from a sweep over the line."""
    line, head, block, piece, image = _place(lines, heads, blocks, slices, LINES_FIRST)
    q = _line(query, query_strides, image, head, line, D)
    k = _line(key, key_strides, image, head, line, D)
    v = _line(value, value_strides, image, head, line, D_V)
    g = _line(grad_out, grad_out_strides, image, head, line, D_V)
    i = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_tile = _load(q, query_strides, i, length, 0, D, BLOCK_D, WIDE)
    g_tile = _load(g, grad_out_strides, i, length, 0, D_V, BLOCK_V, WIDE)
    at = _line(lse, lse_strides, image, head, line, 1) + i * lse_strides[3]
    log_total = tl.load(at, mask=i < length, other=0.0)
    inner = tl.zeros([BLOCK_Q], ACC)
    delta_at = _line(delta, delta_strides, image, head, line, 1) + i * delta_strides[3]
    if DELTA == "given":
        inner = tl.load(delta_at, mask=i < length, other=0.0)
    elif DELTA == "out":
        o = _line(out, out_strides, image, head, line, D_V)
        for first in range(0, D_V, BLOCK_V):
            o_tile = _load(o, out_strides, i, length, first, D_V, BLOCK_V, WIDE).to(ACC)
            inner += tl.sum(o_tile * _load(g, grad_out_strides, i, length, first, D_V, BLOCK_V, WIDE).to(ACC), 1)
    else:
        total = tl.zeros([BLOCK_Q], ACC)
        for start in range(0, length, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            k_tile = _load(k, key_strides, j, length, 0, D, BLOCK_D, WIDE)
            v_tile = _load(v, value_strides, j, length, 0, D_V, BLOCK_V, WIDE)
            s = _products(
                q, q_tile, query_strides, i, k, k_tile, key_strides, j, length, D, BLOCK_D, WIDE, ACC, INTERPRET
            )
            e = _products(
                g, g_tile, grad_out_strides, i, v, v_tile, value_strides, j, length, D_V, BLOCK_V, WIDE, ACC, INTERPRET
            )
            weight = tl.where((j < length)[None, :], tl.exp2((s * SCALE - log_total[:, None]) * _LOG2E), 0.0)
            inner += tl.sum(weight * e, 1)
            total += tl.sum(weight, 1)
        inner = inner / total  # 1 but for the rounding of the log-sum-exp, which would not cancel
    if DELTA != "given":  # every slice writes the same
        tl.store(delta_at, inner, mask=i < length)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    for start in range(0, length, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        k_tile = _load(k, key_strides, j, length, 0, D, BLOCK_D, WIDE)
        v_tile = _load(v, value_strides, j, length, 0, D_V, BLOCK_V, WIDE)
        s = _products(q, q_tile, query_strides, i, k, k_tile, key_strides, j, length, D, BLOCK_D, WIDE, ACC, INTERPRET)
        e = _products(
            g, g_tile, grad_out_strides, i, v, v_tile, value_strides, j, length, D_V, BLOCK_V, WIDE, ACC, INTERPRET
        )
        seen = (j < length)[None, :]
        if SKIP:
            seen = seen & (i[:, None] != j[None, :])
        weight = tl.where(seen, tl.exp2((s * SCALE - log_total[:, None]) * _LOG2E), 0.0)
        e = weight * (e - inner[:, None])
        if D > BLOCK_D:
            k_tile = _load(k, key_strides, j, length, piece * BLOCK_D, D, BLOCK_D, WIDE)
        acc = dot(rounded(e, k_tile.dtype, INTERPRET), k_tile, acc, INTERPRET)
    to = _line(grad_query, grad_query_strides, image, head, line, D)
    _store(to, grad_query_strides, i, length, piece * BLOCK_D, acc * SCALE, ADD, D, BLOCK_D, WIDE, INTERPRET)


@triton.jit
def _backward_key_value(
    grad_key, grad_value, delta, grad_out, query, key, value, lse, grad_key_strides, grad_value_strides,
    delta_strides, grad_out_strides, query_strides, key_strides, value_strides, lse_strides, lines, length, heads,
    blocks, slices, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr,
    ADD_VALUE: tl.constexpr, LINES_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a block of keys."""
    line, head, block, piece, image = _place(lines, heads, blocks, slices, LINES_FIRST)
    q = _line(query, query_strides, image, head, line, D)
    k = _line(key, key_strides, image, head, line, D)
    v = _line(value, value_strides, image, head, line, D_V)
    g = _line(grad_out, grad_out_strides, image, head, line, D_V)
    log_totals = _line(lse, lse_strides, image, head, line, 1)
    deltas = _line(delta, delta_strides, image, head, line, 1)
    j = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = _load(k, key_strides, j, length, 0, D, BLOCK_D, WIDE)
    v_tile = _load(v, value_strides, j, length, 0, D_V, BLOCK_V, WIDE)
    to_key = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    to_value = tl.zeros([BLOCK_K, BLOCK_V], ACC)
    for start in range(0, length, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        q_tile = _load(q, query_strides, i, length, 0, D, BLOCK_D, WIDE)
        g_tile = _load(g, grad_out_strides, i, length, 0, D_V, BLOCK_V, WIDE)
        s = _products(k, k_tile, key_strides, j, q, q_tile, query_strides, i, length, D, BLOCK_D, WIDE, ACC, INTERPRET)
        e = _products(
            v, v_tile, value_strides, j, g, g_tile, grad_out_strides, i, length, D_V, BLOCK_V, WIDE, ACC, INTERPRET
        )
        log_total = tl.load(log_totals + i * lse_strides[3], mask=i < length, other=0.0)
        inner = tl.load(deltas + i * delta_strides[3], mask=i < length, other=0.0)
        seen = (i < length)[None, :]
        if SKIP:
            seen = seen & (i[None, :] != j[:, None])
        weight = tl.where(seen, tl.exp2((s * SCALE - log_total[None, :]) * _LOG2E), 0.0)
        if D_V > BLOCK_V:
            g_tile = _load(g, grad_out_strides, i, length, piece * BLOCK_V, D_V, BLOCK_V, WIDE)
        to_value = dot(rounded(weight, g_tile.dtype, INTERPRET), g_tile, to_value, INTERPRET)
        if D > BLOCK_D:
            q_tile = _load(q, query_strides, i, length, piece * BLOCK_D, D, BLOCK_D, WIDE)
        e = weight * (e - inner[None, :])
        to_key = dot(rounded(e, q_tile.dtype, INTERPRET), q_tile, to_key, INTERPRET)
    to = _line(grad_value, grad_value_strides, image, head, line, D_V)
    _store(to, grad_value_strides, j, length, piece * BLOCK_V, to_value, ADD_VALUE, D_V, BLOCK_V, WIDE, INTERPRET)
    to = _line(grad_key, grad_key_strides, image, head, line, D)
    _store(to, grad_key_strides, j, length, piece * BLOCK_D, to_key * SCALE, ADD, D, BLOCK_D, WIDE, INTERPRET)


def forward(
    out: Tensor,
    first: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    scale: float,
    combine: str,
    axes: str,
) -> None:
    """Writes out, the first axis's result where ``first`` is not [0], and the log-sum-exps."""
    if not out.numel():
        return
    settings = (num_heads, scale)
    if combine == "joint":
        column = torch.empty_like(lse)
        _plan_forward("h", out, column[:, :, 0], None, query, key, value, *settings, skip=True).run()
        _plan_forward("w", out, lse[:, :, 0], column[:, :, 0], query, key, value, *settings).run()
        return
    if combine == "compose" and len(axes) == 2:
        for views, between in _pieces(out, first, lse, query, key, value, num_heads):
            out, lse, query, key, value, heads = views
            _plan_forward(axes[0], between, lse[:, :, 0], None, query, key, value, heads, scale).run()
            _plan_forward(axes[1], out, lse[:, :, 1], None, query, key, between, heads, scale).run()
        return
    _plan_forward(axes[0], out, lse[:, :, 0], None, query, key, value, *settings).run()
    if len(axes) == 2:
        _plan_forward(axes[1], out, lse[:, :, 1], None, query, key, value, *settings, add=True).run()


def backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    first: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    combine: str,
    axes: str,
) -> None:
    """Writes the gradients of query, key and value."""
    if not out.numel():
        return
    delta = torch.empty_like(lse[:, :, 0], memory_format=torch.contiguous_format)
    settings = (num_heads, scale)
    # What out lost when it was rounded is more than float16 would keep of a difference.
    source = "sweep" if query.dtype == torch.float16 else "out"

    def run(axis, to_value, upstream, read, result, which, **modes):
        tensors = (grad_query, grad_key, to_value, upstream, query, key, read, result, lse[:, :, which], delta)
        for launch in _plan_backward(axis, *tensors, *settings, **modes):
            launch.run()

    if combine == "joint":
        run("w", grad_value, grad_out, value, out, 0, delta_from="out")
        run("h", grad_value, grad_out, value, out, 0, delta_from="given", skip=True, add=True, add_value=True)
    elif len(axes) == 1:
        run(axes, grad_value, grad_out, value, out, 0, delta_from=source)
    elif combine == "sum":
        run(axes[1], grad_value, grad_out, value, out, 1, delta_from="sweep")
        run(axes[0], grad_value, grad_out, value, out, 0, delta_from="sweep", add=True, add_value=True)
    else:
        between = torch.empty_like(grad_value)
        run(axes[1], between, grad_out, first, out, 1, delta_from=source)
        run(axes[0], grad_value, between, value, first, 0, delta_from=source, add=True)


def _pieces(out, first, lse, query, key, value, num_heads) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Images, heads and channels whose first results, unless they are kept, take little beside the maps."""
    if first.numel():
        yield (out, lse, query, key, value, num_heads), first
        return
    n, d, d_v = query.shape[0], query.shape[1] // num_heads, value.shape[1] // num_heads
    little = max(sum(x.numel() for x in (out, query, key, value)) // 10, LITTLE)
    pixels = out.shape[2] * out.shape[3]
    images = min(max(little // (num_heads * d_v * pixels), 1), n)
    heads = min(max(little // (d_v * pixels), 1), num_heads) if images == 1 else num_heads
    channels = min(max(little // pixels // 64, 1) * 64, d_v) if heads == 1 else d_v
    for image, head, channel in product(range(0, n, images), range(0, num_heads, heads), range(0, d_v, channels)):
        of = slice(image, image + images)
        some = min(heads, num_heads - head)
        q, k = (x[of, head * d : (head + some) * d] for x in (query, key))
        at = head * d_v + channel
        v, to = (x[of, at : min(at + some * channels, (head + some) * d_v)] for x in (value, out))
        yield (to, lse[of, head : head + some], q, k, v, some), torch.empty_like(to)


def _plan_forward(axis, out, lse, before, query, key, value, *settings, skip=False, add=False) -> Launch:
    maps = {"out": out, "query": query, "key": key, "value": value, "lse": lse, "before": before}
    return _plan(_forward, axis, maps, *settings, SKIP=skip, ADD=add)


def _plan_backward(
    axis, grad_query, grad_key, grad_value, grad_out, query, key, value, out, lse, delta, *settings,
    delta_from, skip=False, add=False, add_value=False,
) -> list[Launch]:  # fmt: skip
    maps = {"grad_out": grad_out, "query": query, "key": key, "value": value, "lse": lse, "delta": delta}
    to_query = {**maps, "grad_query": grad_query, "out": out}
    to_key_value = {**maps, "grad_key": grad_key, "grad_value": grad_value}
    return [
        _plan(_backward_query, axis, to_query, *settings, SKIP=skip, ADD=add, DELTA=delta_from),
        _plan(_backward_key_value, axis, to_key_value, *settings, SKIP=skip, ADD=add, ADD_VALUE=add_value),
    ]


def _plan(kernel: Any, axis: str, maps: dict[str, Tensor | None], num_heads: int, scale: float, **modes: Any) -> Launch:
    query, value = maps["query"], maps["value"]
    assert query is not None
    assert value is not None
    n, _, height, width = query.shape
    lines, length = (width, height) if axis == "h" else (height, width)
    d, d_v = query.shape[1] // num_heads, value.shape[1] // num_heads
    config = configuration(kernel, d, d_v, query.element_size(), length, value.stride(1) == 1)
    order = (0, 1, 3, 2) if axis == "h" else (0, 1, 2, 3)
    present = [x for x in maps.values() if x is not None]
    extents = [sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in present]
    own = config["BLOCK_K"] if kernel is _backward_key_value else config["BLOCK_Q"]
    blocks = triton.cdiv(length, own)
    slices = max(triton.cdiv(d, config["BLOCK_D"]), triton.cdiv(d_v, config["BLOCK_V"]))
    if kernel is not _backward_key_value:
        slices = triton.cdiv(d_v, config["BLOCK_V"]) if kernel is _forward else triton.cdiv(d, config["BLOCK_D"])
    num_warps = config.pop("num_warps")
    args: dict[str, Any] = {
        **maps,
        **{
            f"{name}_strides": (0, 0, 0, 0) if x is None else tuple(x.stride(i) for i in order)
            for name, x in maps.items()
        },
        "lines": lines,
        "length": length,
        "heads": num_heads,
        "blocks": blocks,
        "slices": slices,
        "D": d,
        "D_V": d_v,
        "SCALE": scale,
        "LINES_FIRST": query.stride(order[2]) == 1,
        # Offsets within a line are 32-bit where they can be.
        "WIDE": max(extents) >= 2**31,
        "ACC": tl.float64 if query.element_size() == 8 else tl.float32,
        "INTERPRET": triton.knobs.runtime.interpret,
        **modes,
        **config,
    }
    return Launch(kernel, (n * num_heads * lines * blocks * slices,), args, num_warps, num_stages=2)


def configuration(kernel: Any, d: int, d_v: int, itemsize: int, length: int, innermost: bool) -> dict[str, int]:
    """Blocks of queries, keys and channels, and warps: the largest that do not spill. innermost: the channels are.

    fp32 has no tensor core and unrolls its products, hence the narrower blocks; fp64 is there to be right.
    """
    widest, rows, warps = {2: (64, 64, 4), 4: (32, 32, 4), 8: (16, 8, 4)}[itemsize]
    queries = rows
    if itemsize == 8:
        pass
    elif kernel is _forward:
        if d > 128:
            queries = rows = rows // 2
        elif itemsize == 2:
            widest, warps = 128, 8 if d_v > 32 else 4
    elif itemsize == 2 and max(d, d_v) > 64:
        queries, rows, warps = 32, 32, 8
    elif itemsize == 4 and max(d, d_v) > 32 and innermost:
        queries = rows = 16
    elif itemsize == 4 and max(d, d_v) > 32:
        queries, widest, warps = 16, 16, 8
    most = max(triton.next_power_of_2(length), 16)
    return {
        "BLOCK_Q": min(queries, most),
        "BLOCK_K": min(rows, most),
        "BLOCK_D": min(max(triton.next_power_of_2(d), 16), widest),
        "BLOCK_V": min(max(triton.next_power_of_2(d_v), 16), widest),
        "num_warps": warps,
    }


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named axial_attention/kernel/dtype/layout/head widths/axis.

    Shapes: HFGD's axial attention at stride 4 of a 513 x 513 crop, four heads of 64 channels; CAA's form of it, one
    head of 64 and 256; criss-cross attention, one of 64 and 512.
    """
    cases = []
    for dtype, layout, heads, d, d_v, axis, delta in (
        ("bf16", "channels_last", 4, 64, 64, "h", "out"),
        ("fp32", "nchw", 4, 64, 64, "w", "sweep"),
        ("fp64", "nchw", 4, 64, 64, "w", "out"),
        ("bf16", "nchw", 1, 64, 256, "h", "out"),
        ("fp32", "nchw", 1, 64, 256, "w", "out"),
        ("bf16", "channels_last", 1, 64, 512, "w", "out"),
        ("fp32", "channels_last", 1, 64, 512, "h", "given"),
    ):
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        q, v = (
            torch.empty(2, heads * c, 129, 129, dtype=_DTYPES[dtype], device="meta").to(memory_format=memory_format)
            for c in (d, d_v)
        )
        lse = torch.empty(2, heads, 129, 129, dtype=torch.float64 if dtype == "fp64" else torch.float32, device="meta")
        skip = delta == "given"  # of a column beside its row
        before = lse if d_v == 512 and not skip else None
        launches = [_plan_forward(axis, v, lse, before, q, q, v, heads, 0.125, skip=skip)]
        if dtype != "fp64":
            maps = q, q, v, v, q, q, v, v, lse, lse
            launches += _plan_backward(axis, *maps, heads, 0.125, delta_from=delta, skip=skip, add=True, add_value=skip)
        for name, launch in zip(("forward", "backward_query", "backward_key_value"), launches, strict=False):
            cases.append((f"axial_attention/{name}/{dtype}/{layout}/d{d}/v{d_v}/{axis}", launch))
    return cases


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
