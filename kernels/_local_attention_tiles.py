"""Dilated local attention as matrix products of tiles, for maps with channels last. Formulas: local_attention.py.

Pixels a dilation apart form dilation_y * dilation_x independent maps without dilation, the phases. There a CENTRE of
4 x 4 pixels shares a HALO of taps, 8 x 8 for a window of 5 x 5, and the formulas become, with TAPS >= halo pixels,

    centre [16, C] @ halo [TAPS, C]^T            weights [16, TAPS] @ halo [TAPS, C]

of which 39 % is used: on tensor cores in fp16 and bf16, as plain products in fp32. All scores of a centre are in
registers at once, so softmax is one pass, and channels are walked in blocks, so heads may be of any width. A window
pushed inside the map ("shift") only moves the test of who sees whom.

Considered: centres of 8 x 8 read less (144 taps for 64 pixels) but use 17 % of the products and of the exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dot import dot

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.0e38)
SIDE = tl.constexpr(4)
CENTRE = tl.constexpr(16)


@triton.jit
def _tile(tiles, steps, heads):
    """This program's head, image, and per axis the phase and the first centre pixel, counted within the phase."""
    # Heads of a pixel lie side by side in memory, so neighbouring programs take them.
    program = tl.program_id(0)
    head = program % heads
    program = program // heads
    x0 = program % tiles[1] * SIDE
    program = program // tiles[1]
    phase_x = program % steps[1]
    program = program // steps[1]
    y0 = program % tiles[0] * SIDE
    program = program // tiles[0]
    return head, program // steps[0], program % steps[0], phase_x, y0, x0


@triton.jit
def _window_start(at, phase, dilation, length, KERNEL: tl.constexpr, SHIFT: tl.constexpr):
    """First tap of the window of pixel ``at``, along one axis of a phase."""
    start = at - KERNEL // 2
    if SHIFT:
        start = tl.maximum(tl.minimum(start, tl.cdiv(length - phase, dilation) - KERNEL), 0)
    return start


@triton.jit
def _first_query(at, KERNEL: tl.constexpr, SHIFT: tl.constexpr):
    """First pixel whose window holds key ``at``, along one axis of a phase."""
    first = at - KERNEL // 2
    if SHIFT:
        first = tl.where(at < KERNEL, 0, first)
    return first


@triton.jit
def _position(phase_y, phase_x, y, x, dilation, height, width, WIDE: tl.constexpr):
    """Row and column on the map of pixels counted within a phase, and the mask of those inside."""
    row = phase_y + dilation[0] * y
    column = phase_x + dilation[1] * x
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return row, column, (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _plane(tensor, strides, image, head, WIDTH: tl.constexpr, ALIGN: tl.constexpr):
    """First element of one head of one image; 64-bit, so that the batch may be of any size."""
    offset = image.to(tl.int64) * strides[0] + head.to(tl.int64) * WIDTH * strides[1]
    return tensor + tl.multiple_of(offset, ALIGN)


@triton.jit
def _block(plane, strides, row, column, inside, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to channels first .. first + BLOCK of every pixel, and their mask."""
    channel = first + tl.arange(0, BLOCK)
    pixel = tl.multiple_of(row * strides[2] + column * strides[3], ALIGN)
    offset = pixel[:, None] + (channel.to(row.dtype) * strides[1])[None, :]
    return plane + offset, inside[:, None] & (channel < WIDTH)[None, :]


@triton.jit
def _products(
    a, a_strides, a_row, a_column, a_inside, b, b_strides, b_row, b_column, b_inside,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """<a(centre), b(halo)> [CENTRE, TAPS]; zero where either is outside, where nothing is read."""
    acc = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        a_pointers, a_mask = _block(a, a_strides, a_row, a_column, a_inside, first, WIDTH, BLOCK, ALIGN)
        b_pointers, b_mask = _block(b, b_strides, b_row, b_column, b_inside, first, WIDTH, BLOCK, ALIGN)
        a_tile = tl.load(a_pointers, mask=a_mask, other=0.0)
        b_tile = tl.load(b_pointers, mask=b_mask, other=0.0)
        acc = dot(a_tile, tl.trans(b_tile), acc, INTERPRET)
    return acc


@triton.jit
def _mix(
    to, to_strides, row, column, inside, weights, factor, b, b_strides, b_row, b_column, b_inside,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """to(centre) = factor * sum over the halo of weights * b."""
    weights = weights.to(to.dtype.element_ty)
    for first in range(0, WIDTH, BLOCK):
        pointers, mask = _block(b, b_strides, b_row, b_column, b_inside, first, WIDTH, BLOCK, ALIGN)
        b_tile = tl.load(pointers, mask=mask, other=0.0)
        tile = dot(weights, b_tile, tl.zeros([row.shape[0], BLOCK], tl.float32), INTERPRET) * factor
        pointers, mask = _block(to, to_strides, row, column, inside, first, WIDTH, BLOCK, ALIGN)
        tl.store(pointers, tile.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    out, lse, query, key, value, out_strides, lse_strides, query_strides, key_strides, value_strides,
    height, width, heads, dilation, tiles, steps,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr,
    BORDER: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr, TAPS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    SHIFT: tl.constexpr = BORDER == "shift"
    head, image, phase_y, phase_x, y0, x0 = _tile(tiles, steps, heads)
    i = tl.arange(0, CENTRE)
    j = tl.arange(0, TAPS)
    y = y0 + i // SIDE
    x = x0 + i % SIDE
    tap_y = _window_start(y0, phase_y, dilation[0], height, KERNEL_Y, SHIFT) + j // HALO_X
    tap_x = _window_start(x0, phase_x, dilation[1], width, KERNEL_X, SHIFT) + j % HALO_X
    row, column, inside = _position(phase_y, phase_x, y, x, dilation, height, width, WIDE)
    tap_row, tap_column, tap_inside = _position(phase_y, phase_x, tap_y, tap_x, dilation, height, width, WIDE)
    tap_inside &= j < HALO_Y * HALO_X
    from_y = tap_y[None, :] - _window_start(y, phase_y, dilation[0], height, KERNEL_Y, SHIFT)[:, None]
    from_x = tap_x[None, :] - _window_start(x, phase_x, dilation[1], width, KERNEL_X, SHIFT)[:, None]
    seen = (from_y >= 0) & (from_y < KERNEL_Y) & (from_x >= 0) & (from_x < KERNEL_X)
    if BORDER == "mask":
        seen &= tap_inside[None, :]

    q_plane = _plane(query, query_strides, image, head, D, ALIGN)
    k_plane = _plane(key, key_strides, image, head, D, ALIGN)
    s = _products(
        q_plane, query_strides, row, column, inside, k_plane, key_strides, tap_row, tap_column, tap_inside,
        D, BLOCK_D, ALIGN, INTERPRET,
    )  # fmt: skip
    s = tl.where(seen, s * (SCALE * _LOG2E), -float("inf"))
    top = tl.maximum(tl.max(s, 1), _LOWEST)
    weight = tl.exp2(s - top[:, None])
    total = tl.where(inside, tl.sum(weight, 1), 1.0)
    at = _plane(lse, lse_strides, image, head, 1, 1) + row * lse_strides[2] + column * lse_strides[3]
    tl.store(at, (top + tl.log2(total)) * _LN2, mask=inside)
    o_plane = _plane(out, out_strides, image, head, D_V, ALIGN)
    v_plane = _plane(value, value_strides, image, head, D_V, ALIGN)
    _mix(
        o_plane, out_strides, row, column, inside, weight, (1.0 / total)[:, None],
        v_plane, value_strides, tap_row, tap_column, tap_inside, D_V, BLOCK_V, ALIGN, INTERPRET,
    )  # fmt: skip


@triton.jit
def _backward_query(
    grad_query, delta, grad_out, grad_lse, query, key, value, out, lse,
    grad_query_strides, delta_strides, grad_out_strides, grad_lse_strides, query_strides, key_strides, value_strides,
    out_strides, lse_strides, height, width, heads, dilation, tiles, steps,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr,
    BORDER: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr, TAPS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_query, and delta for the other kernel."""
    SHIFT: tl.constexpr = BORDER == "shift"
    head, image, phase_y, phase_x, y0, x0 = _tile(tiles, steps, heads)
    i = tl.arange(0, CENTRE)
    j = tl.arange(0, TAPS)
    y = y0 + i // SIDE
    x = x0 + i % SIDE
    tap_y = _window_start(y0, phase_y, dilation[0], height, KERNEL_Y, SHIFT) + j // HALO_X
    tap_x = _window_start(x0, phase_x, dilation[1], width, KERNEL_X, SHIFT) + j % HALO_X
    row, column, inside = _position(phase_y, phase_x, y, x, dilation, height, width, WIDE)
    tap_row, tap_column, tap_inside = _position(phase_y, phase_x, tap_y, tap_x, dilation, height, width, WIDE)
    tap_inside &= j < HALO_Y * HALO_X
    from_y = tap_y[None, :] - _window_start(y, phase_y, dilation[0], height, KERNEL_Y, SHIFT)[:, None]
    from_x = tap_x[None, :] - _window_start(x, phase_x, dilation[1], width, KERNEL_X, SHIFT)[:, None]
    # A tap outside the map has a zero key: whatever its weight, it adds nothing.
    seen = (from_y >= 0) & (from_y < KERNEL_Y) & (from_x >= 0) & (from_x < KERNEL_X) & tap_inside[None, :]

    g_plane = _plane(grad_out, grad_out_strides, image, head, D_V, ALIGN)
    o_plane = _plane(out, out_strides, image, head, D_V, ALIGN)
    dot = tl.zeros([CENTRE], tl.float32)
    for first in range(0, D_V, BLOCK_V):
        g_pointers, mask = _block(g_plane, grad_out_strides, row, column, inside, first, D_V, BLOCK_V, ALIGN)
        o_pointers, mask = _block(o_plane, out_strides, row, column, inside, first, D_V, BLOCK_V, ALIGN)
        g = tl.load(g_pointers, mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(g * tl.load(o_pointers, mask=mask, other=0.0).to(tl.float32), 1)
    if grad_lse is not None:
        at = _plane(grad_lse, grad_lse_strides, image, head, 1, 1)
        at += row * grad_lse_strides[2] + column * grad_lse_strides[3]
        dot -= tl.load(at, mask=inside, other=0.0)
    at = _plane(delta, delta_strides, image, head, 1, 1) + row * delta_strides[2] + column * delta_strides[3]
    tl.store(at, dot, mask=inside)
    at = _plane(lse, lse_strides, image, head, 1, 1) + row * lse_strides[2] + column * lse_strides[3]
    log_total = tl.load(at, mask=inside, other=0.0) * _LOG2E

    q_plane = _plane(query, query_strides, image, head, D, ALIGN)
    k_plane = _plane(key, key_strides, image, head, D, ALIGN)
    v_plane = _plane(value, value_strides, image, head, D_V, ALIGN)
    s = _products(
        q_plane, query_strides, row, column, inside, k_plane, key_strides, tap_row, tap_column, tap_inside,
        D, BLOCK_D, ALIGN, INTERPRET,
    )  # fmt: skip
    grad = _products(
        g_plane, grad_out_strides, row, column, inside, v_plane, value_strides, tap_row, tap_column, tap_inside,
        D_V, BLOCK_V, ALIGN, INTERPRET,
    )  # fmt: skip
    weight = tl.where(seen, tl.exp2(s * (SCALE * _LOG2E) - log_total[:, None]), 0.0)
    to = _plane(grad_query, grad_query_strides, image, head, D, ALIGN)
    _mix(
        to, grad_query_strides, row, column, inside, weight * (grad - dot[:, None]), SCALE,
        k_plane, key_strides, tap_row, tap_column, tap_inside, D, BLOCK_D, ALIGN, INTERPRET,
    )  # fmt: skip


@triton.jit
def _backward_key_value(
    grad_key, grad_value, delta, grad_out, query, key, value, lse,
    grad_key_strides, grad_value_strides, delta_strides, grad_out_strides, query_strides, key_strides, value_strides,
    lse_strides, height, width, heads, dilation, tiles, steps,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr,
    BORDER: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr, TAPS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a centre of keys; the halo is the queries that see them."""
    SHIFT: tl.constexpr = BORDER == "shift"
    head, image, phase_y, phase_x, y0, x0 = _tile(tiles, steps, heads)
    i = tl.arange(0, CENTRE)
    j = tl.arange(0, TAPS)
    y = y0 + i // SIDE
    x = x0 + i % SIDE
    from_y = _first_query(y0, KERNEL_Y, SHIFT) + j // HALO_X
    from_x = _first_query(x0, KERNEL_X, SHIFT) + j % HALO_X
    row, column, inside = _position(phase_y, phase_x, y, x, dilation, height, width, WIDE)
    from_row, from_column, from_inside = _position(phase_y, phase_x, from_y, from_x, dilation, height, width, WIDE)
    from_inside &= j < HALO_Y * HALO_X
    tap_y = y[:, None] - _window_start(from_y, phase_y, dilation[0], height, KERNEL_Y, SHIFT)[None, :]
    tap_x = x[:, None] - _window_start(from_x, phase_x, dilation[1], width, KERNEL_X, SHIFT)[None, :]
    seen = (tap_y >= 0) & (tap_y < KERNEL_Y) & (tap_x >= 0) & (tap_x < KERNEL_X) & from_inside[None, :]

    q_plane = _plane(query, query_strides, image, head, D, ALIGN)
    k_plane = _plane(key, key_strides, image, head, D, ALIGN)
    v_plane = _plane(value, value_strides, image, head, D_V, ALIGN)
    g_plane = _plane(grad_out, grad_out_strides, image, head, D_V, ALIGN)
    s = _products(
        k_plane, key_strides, row, column, inside, q_plane, query_strides, from_row, from_column, from_inside,
        D, BLOCK_D, ALIGN, INTERPRET,
    )  # fmt: skip
    at = _plane(lse, lse_strides, image, head, 1, 1) + from_row * lse_strides[2] + from_column * lse_strides[3]
    log_total = tl.load(at, mask=from_inside, other=0.0)
    at = _plane(delta, delta_strides, image, head, 1, 1) + from_row * delta_strides[2] + from_column * delta_strides[3]
    dot = tl.load(at, mask=from_inside, other=0.0)
    weight = tl.where(seen, tl.exp2((s * SCALE - log_total[None, :]) * _LOG2E), 0.0)
    to = _plane(grad_value, grad_value_strides, image, head, D_V, ALIGN)
    _mix(
        to, grad_value_strides, row, column, inside, weight, 1.0,
        g_plane, grad_out_strides, from_row, from_column, from_inside, D_V, BLOCK_V, ALIGN, INTERPRET,
    )  # fmt: skip
    grad = _products(
        v_plane, value_strides, row, column, inside, g_plane, grad_out_strides, from_row, from_column, from_inside,
        D_V, BLOCK_V, ALIGN, INTERPRET,
    )  # fmt: skip
    to = _plane(grad_key, grad_key_strides, image, head, D, ALIGN)
    _mix(
        to, grad_key_strides, row, column, inside, weight * (grad - dot[None, :]), SCALE,
        q_plane, query_strides, from_row, from_column, from_inside, D, BLOCK_D, ALIGN, INTERPRET,
    )  # fmt: skip
