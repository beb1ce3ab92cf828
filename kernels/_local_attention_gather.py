"""Dilated local attention, one gather per tap: any dtype, layout and window. Formulas: local_attention.py.

A program owns a tile of pixels of one head and reads their taps one by one through the cache. With channels last a tile
takes pixels a dilation apart, which share taps; in NCHW its columns stay adjacent, for coalescing. A window pushed
inside the map ("shift") sees, in place of a tap that fell outside, the position kernel_size * dilation further in.

Tried in NCHW: several taps unrolled at once, as with channels last. The addresses of their channels spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# A finite start of the running maximum: with -inf a row of masked taps would give inf - inf.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _tile(height, width, tiles, steps, heads, slices, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, WIDE: tl.constexpr):
    """This program's pixels y, x [BLOCK_Y * BLOCK_X], the mask of those inside the map, image, head, channel slice."""
    program = tl.program_id(0)
    tile_x = program % tiles[1]
    program = program // tiles[1]
    phase_x = program % steps[1]
    program = program // steps[1]
    tile_y = program % tiles[0]
    program = program // tiles[0]
    phase_y = program % steps[0]
    program = program // steps[0]
    slice_ = program % slices
    program = program // slices
    i = tl.arange(0, BLOCK_Y * BLOCK_X)
    y = phase_y + steps[0] * (tile_y * BLOCK_Y + i // BLOCK_X)
    x = phase_x + steps[1] * (tile_x * BLOCK_X + i % BLOCK_X)
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return y, x, (y < height) & (x < width), program // heads, program % heads, slice_


@triton.jit
def _tap(at, offset, period, length, SHIFT: tl.constexpr):
    """Position of a tap along one axis, and whether it is inside the map."""
    at += offset
    if SHIFT:
        at = tl.where(at < 0, at + period, at)
        at = tl.where(at >= length, at - period, at)
    return at, (at >= 0) & (at < length)


@triton.jit
def _plane(tensor, strides, image, head, WIDTH: tl.constexpr):
    """First element of one head of one image; 64-bit, so that the batch may be of any size."""
    return tensor + image.to(tl.int64) * strides[0] + head.to(tl.int64) * WIDTH * strides[1]


@triton.jit
def _channels(plane, strides, y, x, inside, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to channels first .. first + BLOCK of every pixel, and their mask."""
    channel = first + tl.arange(0, BLOCK)
    pixel = tl.multiple_of(y * strides[2] + x * strides[3], ALIGN)
    offset = pixel[:, None] + (channel.to(y.dtype) * strides[1])[None, :]
    return plane + offset, inside[:, None] & (channel < WIDTH)[None, :]


@triton.jit
def _load(
    plane, strides, y, x, inside, first,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tile [pixels, BLOCK] in the accumulation type; zero outside, where nothing is read."""
    pointers, mask = _channels(plane, strides, y, x, inside, first, WIDTH, BLOCK, ALIGN)
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


@triton.jit
def _store(plane, strides, y, x, inside, first, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    pointers, mask = _channels(plane, strides, y, x, inside, first, WIDTH, BLOCK, ALIGN)
    tl.store(pointers, tile.to(plane.dtype.element_ty), mask=mask)


@triton.jit
def _inner(
    a, a_strides, a_y, a_x, b, b_strides, b_y, b_x, inside,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """<a(a_y, a_x), b(b_y, b_x)> [pixels], BLOCK channels at a time: for heads too wide to keep in registers."""
    total = tl.zeros([inside.shape[0], BLOCK], ACC)
    for first in range(0, WIDTH, BLOCK):
        total += _load(a, a_strides, a_y, a_x, inside, first, WIDTH, BLOCK, ALIGN, ACC) * _load(
            b, b_strides, b_y, b_x, inside, first, WIDTH, BLOCK, ALIGN, ACC
        )
    return tl.sum(total, 1)


@triton.jit
def _forward(
    out, lse, query, key, value, out_strides, lse_strides, query_strides, key_strides, value_strides,
    height, width, heads, dilation, tiles, steps, slices,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr,
    BORDER: tl.constexpr, GROUP: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, SLICE_V: tl.constexpr,
    RESIDENT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """GROUP taps of a row at a time keep their scores in registers; the softmax is rescaled from group to group."""
    SHIFT: tl.constexpr = BORDER == "shift"
    y, x, pixel, image, head, slice_ = _tile(height, width, tiles, steps, heads, slices, BLOCK_Y, BLOCK_X, WIDE)
    q_plane = _plane(query, query_strides, image, head, D)
    k_plane = _plane(key, key_strides, image, head, D)
    v_plane = _plane(value, value_strides, image, head, D_V)
    first = slice_ * SLICE_V
    if RESIDENT:
        q = _load(q_plane, query_strides, y, x, pixel, 0, D, BLOCK_D, ALIGN, ACC)

    top = tl.full([BLOCK_Y * BLOCK_X], _LOWEST, ACC)
    total = tl.zeros([BLOCK_Y * BLOCK_X], ACC)
    acc = tl.zeros([BLOCK_Y * BLOCK_X, SLICE_V], ACC)
    for taps in range(KERNEL_Y * (KERNEL_X // GROUP)):
        i = taps // (KERNEL_X // GROUP)
        first_j = taps % (KERNEL_X // GROUP) * GROUP
        tap_y, inside_y = _tap(y, (i - KERNEL_Y // 2) * dilation[0], KERNEL_Y * dilation[0], height, SHIFT)
        inside_y &= pixel
        scores = ()
        new_top = top
        for j in tl.static_range(GROUP):
            tap_x, inside_x = _tap(x, (first_j + j - KERNEL_X // 2) * dilation[1], KERNEL_X * dilation[1], width, SHIFT)
            inside = inside_y & inside_x
            if RESIDENT:
                s = tl.sum(q * _load(k_plane, key_strides, tap_y, tap_x, inside, 0, D, BLOCK_D, ALIGN, ACC), 1)
            else:
                s = _inner(
                    q_plane, query_strides, y, x, k_plane, key_strides, tap_y, tap_x, inside, D, BLOCK_D, ALIGN, ACC
                )
            s *= SCALE * _LOG2E
            if BORDER == "mask":
                s = tl.where(inside, s, -float("inf"))
            new_top = tl.maximum(new_top, s)
            scores += (s,)
        rescale = tl.exp2(top - new_top)
        top = new_top
        total *= rescale
        acc *= rescale[:, None]
        for j in tl.static_range(GROUP):
            tap_x, inside_x = _tap(x, (first_j + j - KERNEL_X // 2) * dilation[1], KERNEL_X * dilation[1], width, SHIFT)
            inside = inside_y & inside_x
            weight = tl.exp2(scores[j] - top)
            total += weight
            v = _load(v_plane, value_strides, tap_y, tap_x, inside, first, D_V, SLICE_V, ALIGN, ACC)
            acc += weight[:, None] * v
    o_plane = _plane(out, out_strides, image, head, D_V)
    total = tl.where(pixel, total, 1.0)
    _store(o_plane, out_strides, y, x, pixel, first, acc / total[:, None], D_V, SLICE_V, ALIGN)
    at = _plane(lse, lse_strides, image, head, 1) + y * lse_strides[2] + x * lse_strides[3]
    tl.store(at, (top + tl.log2(total)) * _LN2, mask=pixel & (slice_ == 0))


@triton.jit
def _backward_query(
    grad_query, delta, grad_out, grad_lse, query, key, value, out, lse,
    grad_query_strides, delta_strides, grad_out_strides, grad_lse_strides, query_strides, key_strides, value_strides,
    out_strides, lse_strides, height, width, heads, dilation, tiles, steps, slices,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr,
    BORDER: tl.constexpr, GROUP: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, SLICE_D: tl.constexpr,
    RESIDENT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad_query, and delta for the other kernel."""
    SHIFT: tl.constexpr = BORDER == "shift"
    y, x, pixel, image, head, slice_ = _tile(height, width, tiles, steps, heads, slices, BLOCK_Y, BLOCK_X, WIDE)
    q_plane = _plane(query, query_strides, image, head, D)
    k_plane = _plane(key, key_strides, image, head, D)
    v_plane = _plane(value, value_strides, image, head, D_V)
    g_plane = _plane(grad_out, grad_out_strides, image, head, D_V)
    o_plane = _plane(out, out_strides, image, head, D_V)
    first = slice_ * SLICE_D
    if RESIDENT:
        q = _load(q_plane, query_strides, y, x, pixel, 0, D, BLOCK_D, ALIGN, ACC)
        g = _load(g_plane, grad_out_strides, y, x, pixel, 0, D_V, BLOCK_V, ALIGN, ACC)
        dot = tl.sum(g * _load(o_plane, out_strides, y, x, pixel, 0, D_V, BLOCK_V, ALIGN, ACC), 1)
    else:
        dot = _inner(g_plane, grad_out_strides, y, x, o_plane, out_strides, y, x, pixel, D_V, BLOCK_V, ALIGN, ACC)
    if grad_lse is not None:
        at = _plane(grad_lse, grad_lse_strides, image, head, 1) + y * grad_lse_strides[2] + x * grad_lse_strides[3]
        dot -= tl.load(at, mask=pixel, other=0.0)
    at = _plane(delta, delta_strides, image, head, 1) + y * delta_strides[2] + x * delta_strides[3]
    tl.store(at, dot, mask=pixel & (slice_ == 0))
    at = _plane(lse, lse_strides, image, head, 1) + y * lse_strides[2] + x * lse_strides[3]
    log_total = tl.load(at, mask=pixel, other=0.0) * _LOG2E

    acc = tl.zeros([BLOCK_Y * BLOCK_X, SLICE_D], ACC)
    for taps in range(KERNEL_Y * (KERNEL_X // GROUP)):
        i = taps // (KERNEL_X // GROUP)
        first_j = taps % (KERNEL_X // GROUP) * GROUP
        tap_y, inside_y = _tap(y, (i - KERNEL_Y // 2) * dilation[0], KERNEL_Y * dilation[0], height, SHIFT)
        inside_y &= pixel
        for j in tl.static_range(GROUP):
            tap_x, inside_x = _tap(x, (first_j + j - KERNEL_X // 2) * dilation[1], KERNEL_X * dilation[1], width, SHIFT)
            inside = inside_y & inside_x
            k = _load(k_plane, key_strides, tap_y, tap_x, inside, first, D, SLICE_D, ALIGN, ACC)
            if RESIDENT:
                s = tl.sum(q * k, 1)
                grad = tl.sum(g * _load(v_plane, value_strides, tap_y, tap_x, inside, 0, D_V, BLOCK_V, ALIGN, ACC), 1)
            else:
                s = _inner(
                    q_plane, query_strides, y, x, k_plane, key_strides, tap_y, tap_x, inside, D, BLOCK_D, ALIGN, ACC
                )
                grad = _inner(
                    g_plane, grad_out_strides, y, x, v_plane, value_strides, tap_y, tap_x, inside,
                    D_V, BLOCK_V, ALIGN, ACC,
                )  # fmt: skip
            # Outside the map the key is zero, but exp(-lse) may be inf there under border="mask".
            weight = tl.where(inside, tl.exp2(s * (SCALE * _LOG2E) - log_total), 0.0)
            acc += (weight * (grad - dot))[:, None] * k
    plane = _plane(grad_query, grad_query_strides, image, head, D)
    _store(plane, grad_query_strides, y, x, pixel, first, acc * SCALE, D, SLICE_D, ALIGN)


@triton.jit
def _images(at, which, period, pad, length):
    """The position, or the one of its two wrapped images before and after the map, at which a window may see it."""
    before = at - period
    after = at + period
    position = tl.where(which == 0, at, tl.where(which == 1, before, after))
    seen_before = (before < 0) & (before >= -pad)
    seen_after = (after >= length) & (after < length + pad)
    return position, (which == 0) | ((which == 1) & seen_before) | ((which == 2) & seen_after)


@triton.jit
def _backward_key_value(
    grad_key, grad_value, delta, grad_out, query, key, value, lse,
    grad_key_strides, grad_value_strides, delta_strides, grad_out_strides, query_strides, key_strides, value_strides,
    lse_strides, height, width, heads, dilation, tiles, steps, slices,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, SCALE: tl.constexpr,
    BORDER: tl.constexpr, GROUP: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, SLICE_D: tl.constexpr,
    SLICE_V: tl.constexpr, RESIDENT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a tile of key positions, gathered from the queries that see them."""
    y, x, pixel, image, head, slice_ = _tile(height, width, tiles, steps, heads, slices, BLOCK_Y, BLOCK_X, WIDE)
    q_plane = _plane(query, query_strides, image, head, D)
    k_plane = _plane(key, key_strides, image, head, D)
    v_plane = _plane(value, value_strides, image, head, D_V)
    g_plane = _plane(grad_out, grad_out_strides, image, head, D_V)
    lse_plane = _plane(lse, lse_strides, image, head, 1)
    delta_plane = _plane(delta, delta_strides, image, head, 1)
    first_d = slice_ * SLICE_D
    first_v = slice_ * SLICE_V
    if RESIDENT:
        k = _load(k_plane, key_strides, y, x, pixel, 0, D, BLOCK_D, ALIGN, ACC)
        v = _load(v_plane, value_strides, y, x, pixel, 0, D_V, BLOCK_V, ALIGN, ACC)

    acc_k = tl.zeros([BLOCK_Y * BLOCK_X, SLICE_D], ACC)
    acc_v = tl.zeros([BLOCK_Y * BLOCK_X, SLICE_V], ACC)
    # Under border="shift" windows near an edge see a position through its wrapped images too: up to three per axis.
    for which in range(9 if BORDER == "shift" else 1):
        seen_y = y
        seen_x = x
        seen = pixel
        rows = KERNEL_Y
        if BORDER == "shift":
            seen_y, ok_y = _images(y, which // 3, KERNEL_Y * dilation[0], KERNEL_Y // 2 * dilation[0], height)
            seen_x, ok_x = _images(x, which % 3, KERNEL_X * dilation[1], KERNEL_X // 2 * dilation[1], width)
            seen = pixel & ok_y & ok_x
            rows = KERNEL_Y * tl.max(seen.to(tl.int32), 0)
        for taps in range(rows * (KERNEL_X // GROUP)):
            i = taps // (KERNEL_X // GROUP)
            first_j = taps % (KERNEL_X // GROUP) * GROUP
            at_y = seen_y - (i - KERNEL_Y // 2) * dilation[0]
            inside_y = seen & (at_y >= 0) & (at_y < height)
            for j in tl.static_range(GROUP):
                at_x = seen_x - (first_j + j - KERNEL_X // 2) * dilation[1]
                inside = inside_y & (at_x >= 0) & (at_x < width)
                q = _load(q_plane, query_strides, at_y, at_x, inside, first_d, D, SLICE_D, ALIGN, ACC)
                g = _load(g_plane, grad_out_strides, at_y, at_x, inside, first_v, D_V, SLICE_V, ALIGN, ACC)
                if RESIDENT:
                    s = tl.sum(q * k, 1)
                    grad = tl.sum(g * v, 1)
                else:
                    s = _inner(
                        q_plane, query_strides, at_y, at_x, k_plane, key_strides, y, x, inside, D, BLOCK_D, ALIGN, ACC
                    )
                    grad = _inner(
                        g_plane, grad_out_strides, at_y, at_x, v_plane, value_strides, y, x, inside,
                        D_V, BLOCK_V, ALIGN, ACC,
                    )  # fmt: skip
                log_total = tl.load(lse_plane + at_y * lse_strides[2] + at_x * lse_strides[3], mask=inside, other=0.0)
                dot = tl.load(delta_plane + at_y * delta_strides[2] + at_x * delta_strides[3], mask=inside, other=0.0)
                weight = tl.where(inside, tl.exp2((s * SCALE - log_total) * _LOG2E), 0.0)
                acc_k += (weight * (grad - dot))[:, None] * q
                acc_v += weight[:, None] * g
    plane = _plane(grad_key, grad_key_strides, image, head, D)
    _store(plane, grad_key_strides, y, x, pixel, first_d, acc_k * SCALE, D, SLICE_D, ALIGN)
    plane = _plane(grad_value, grad_value_strides, image, head, D_V)
    _store(plane, grad_value_strides, y, x, pixel, first_v, acc_v, D_V, SLICE_V, ALIGN)
