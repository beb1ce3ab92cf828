"""Multi-scale strip convolution in Triton, forward and backward: one kernel for every convolution of it.

    forward    a = K * x + b,  h_i = w_i * a + b_i,  out = a + sum_i (v_i * h_i + b'_i)     w_i: 1 x k, v_i: k x 1
    backward   u_i = v_i^T * g,  da = g + sum_i w_i^T * u_i,  dx = K^T * da
               dv_i = <h_i, g>,  dw_i = <a, u_i>,  dK = <x, da>,  db' = sum g,  db_i = sum u_i,  db = sum da

Layout: x, out [N, C, H, W], any strides; taps [C, all taps], biases [C, 1 + 2 pairs].

A program owns a block of pixels and of channels. What lies between the convolutions is stored, once each, in x's dtype:
Triton has no halo in shared memory. Gradients of taps are sums over parts of the pixels, then over the parts in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dot import rounded
from ._launch import Launch

__all__ = ["aot_cases", "at", "backward", "channels_of", "forward", "pixels_of"]


@triton.jit
def pixels_of(first, size, count, BLOCK: tl.constexpr):
    """Image (64-bit), row and column of a block of pixels, and which exist."""
    pixel = first.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    line = pixel // size[1]
    return line // size[0], (line % size[0]).to(tl.int32), (pixel % size[1]).to(tl.int32), pixel < count


@triton.jit
def channels_of(block, C, BLOCK: tl.constexpr):
    c = block * BLOCK + tl.arange(0, BLOCK)
    return c.to(tl.int64), c < C


@triton.jit
def at(tensor, strides, image, y, x, c):
    """Pointers to the pixels and channels of a block."""
    pixel = image * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return tensor + pixel[:, None] + (c * strides[1])[None, :]


@triton.jit
def _shifted(pointers, strides, y, x, mask, dy, dx, size):
    """The block as seen dy rows and dx columns further on; zero outside the map."""
    inside = (y + dy >= 0) & (y + dy < size[0]) & (x + dx >= 0) & (x + dx < size[1])
    step = tl.cast(dy, tl.int64) * strides[2] + tl.cast(dx, tl.int64) * strides[3]
    return tl.load(pointers + step, mask=mask & inside[:, None], other=0.0)


@triton.jit
def _add_window(
    acc, pointers, strides, y, x, mask, taps, tap_stride, exists, size,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, REVERSED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc + window * map."""
    for t in range(HEIGHT * WIDTH):
        tap = FIRST + ((HEIGHT * WIDTH - 1 - t) if REVERSED else t)
        factor = tl.load(taps + tap * tap_stride, mask=exists, other=0.0).to(ACC)
        seen = _shifted(pointers, strides, y, x, mask, t // WIDTH - HEIGHT // 2, t % WIDTH - WIDTH // 2, size)
        acc += factor[None, :] * seen.to(ACC)
    return acc


@triton.jit
def _convolve(
    out, base, maps, taps, biases, scaled, scale,
    out_strides, base_strides, map_strides, map_step, taps_strides, biases_strides, scaled_strides, scale_strides,
    size, count, C, blocks,
    WINDOWS: tl.constexpr, BIASES: tl.constexpr, REVERSED: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = base + sum of biases + sum_i windows_i * maps_i + scaled scale; a window is (height, width, first tap)."""
    image, y, x, inside = pixels_of(tl.program_id(0) // blocks, size, count, BLOCK_P)
    c, exists = channels_of(tl.program_id(0) % blocks, C, BLOCK_C)
    mask = inside[:, None] & exists[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i in tl.static_range(len(BIASES)):
        acc += tl.load(biases + c * biases_strides[0] + BIASES[i] * biases_strides[1], mask=exists).to(ACC)[None, :]
    if base is not None:
        acc += tl.load(at(base, base_strides, image, y, x, c), mask=mask).to(ACC)
    for i in tl.static_range(len(WINDOWS)):
        pointers = at(maps, map_strides, image, y, x, c) + i * map_step
        acc = _add_window(
            acc, pointers, map_strides, y, x, mask, taps + c * taps_strides[0], taps_strides[1], exists, size,
            WINDOWS[i][0], WINDOWS[i][1], WINDOWS[i][2], REVERSED, ACC,
        )  # fmt: skip
    if scaled is not None:
        product = tl.load(at(scaled, scaled_strides, image, y, x, c), mask=mask).to(ACC)
        acc += product * tl.load(at(scale, scale_strides, image, y, x, c), mask=mask).to(ACC)
    value = rounded(acc, out.dtype.element_ty, INTERPRET)
    tl.store(at(out, out_strides, image, y, x, c), value, mask=mask)


@triton.jit
def _sum_taps(
    parts, fixed, seen, parts_strides, fixed_strides, seen_strides, size, count, C, blocks, steps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts[part, c, FIRST + t] = sum over the part's pixels of fixed(p) seen(p + offset_t)."""
    program = tl.program_id(0)
    t = program % (HEIGHT * WIDTH)
    program = program // (HEIGHT * WIDTH)
    part = program // blocks
    c, exists = channels_of(program % blocks, C, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for step in range(steps):
        image, y, x, inside = pixels_of(part * steps + step, size, count, BLOCK_P)
        mask = inside[:, None] & exists[None, :]
        value = tl.load(at(fixed, fixed_strides, image, y, x, c), mask=mask, other=0.0).to(ACC)
        pointers = at(seen, seen_strides, image, y, x, c)
        other = _shifted(pointers, seen_strides, y, x, mask, t // WIDTH - HEIGHT // 2, t % WIDTH - WIDTH // 2, size)
        acc += value * other.to(ACC)
    to = parts + part * parts_strides[0] + c * parts_strides[1] + (FIRST + t) * parts_strides[2]
    tl.store(to, tl.sum(acc, 0), mask=exists)


def forward(
    out: Tensor, x: Tensor, taps: Tensor, biases: Tensor, kernel_size: list[int], strip_lengths: list[int]
) -> None:
    """Writes out."""
    if out.numel():
        for launch in _plan_forward(out, x, taps, biases, kernel_size, strip_lengths):
            launch.run()


def backward(
    grad_x: Tensor,
    grad_taps: Tensor,
    grad_biases: Tensor,
    grad_out: Tensor,
    x: Tensor,
    taps: Tensor,
    biases: Tensor,
    scaled: Tensor | None,
    scale: Tensor | None,
    kernel_size: list[int],
    strip_lengths: list[int],
) -> None:
    """Writes the gradients; grad_x also gets the product of ``scaled`` and ``scale``."""
    if not x.numel():
        grad_taps.zero_(), grad_biases.zero_()
        return
    tensors = (grad_x, grad_out, x, taps, biases, scaled, scale)
    launches, parts, sums = _plan_backward(*tensors, kernel_size, strip_lengths)
    for launch in launches:
        launch.run()
    grad_taps.copy_(parts.sum(0))
    for i, m in enumerate(sums):
        grad_biases[:, i] = m.sum((0, 2, 3), dtype=parts.dtype)


def _windows(kernel_size: list[int], strip_lengths: list[int]) -> list[tuple[int, int, int]]:
    """(height, width, first tap) of the kernel, then of 1 x k and k x 1 of each pair."""
    first, found = 0, []
    for height, width in [tuple(kernel_size)] + [w for k in strip_lengths for w in ((1, k), (k, 1))]:
        found.append((height, width, first))
        first += height * width
    return found


def _blocks(x: Tensor) -> tuple[int, int]:
    """Pixels and channels of a program: whole vectors along whichever is adjacent in memory."""
    channels = min(triton.next_power_of_2(x.shape[1]), 64 if _adjacent(x) else 8)
    return (1024 if x.element_size() < 8 else 512) // channels, channels


def _adjacent(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _maps(x: Tensor, count: int) -> Tensor:
    """``count`` maps of x's shape and layout."""
    n, c, h, w = x.shape
    if _adjacent(x):
        return torch.empty((count, n, h, w, c), dtype=x.dtype, device=x.device).permute(0, 1, 4, 2, 3)
    return torch.empty((count, n, c, h, w), dtype=x.dtype, device=x.device)


def _common(x: Tensor) -> dict[str, Any]:
    n, c, h, w = x.shape
    pixels, channels = _blocks(x)
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"size": (h, w), "count": n * h * w, "C": c, "blocks": triton.cdiv(c, channels), "ACC": acc,
            "BLOCK_P": pixels, "BLOCK_C": channels}  # fmt: skip


def _convolution(
    out: Tensor,
    maps: Tensor,
    windows: list[tuple[int, int, int]],
    taps: Tensor,
    biases: Tensor,
    *,
    base: Tensor | None = None,
    which: tuple[int, ...] = (),
    reverse: bool = False,
    scaled: Tensor | None = None,
    scale: Tensor | None = None,
) -> Launch:
    """``maps`` [maps, N, C, H, W], a window each; ``which`` biases are added; ``reverse`` is the adjoint."""
    common = _common(out)
    tensors = {"out": out, "base": base, "taps": taps, "biases": biases, "scaled": scaled, "scale": scale}
    args: dict[str, Any] = {**tensors, "maps": maps, "map_strides": maps.stride()[1:], "map_step": maps.stride(0)}
    args |= {f"{name}_strides": None if m is None else m.stride() for name, m in tensors.items()}
    args |= {"WINDOWS": tuple(windows), "BIASES": which, "REVERSED": reverse, **common}
    args["INTERPRET"] = triton.knobs.runtime.interpret
    return Launch(_convolve, (triton.cdiv(common["count"], common["BLOCK_P"]) * common["blocks"],), args)


def _rows_of(x: Tensor, taps: Tensor, biases: Tensor, windows: list, maps: Tensor) -> Iterator[Launch]:
    """a into maps[0], h_i into the following."""
    yield _convolution(maps[0], x[None], windows[:1], taps, biases, which=(0,))
    for i, window in enumerate(windows[1::2]):
        yield _convolution(maps[1 + i], maps[:1], [window], taps, biases, which=(1 + 2 * i,))


def _plan_forward(
    out: Tensor, x: Tensor, taps: Tensor, biases: Tensor, kernel_size: list[int], strip_lengths: list[int]
) -> list[Launch]:
    windows, pairs = _windows(kernel_size, strip_lengths), len(strip_lengths)
    maps = _maps(out, 1 + pairs)
    last = tuple(2 + 2 * i for i in range(pairs))
    return [
        *_rows_of(x, taps, biases, windows, maps),
        _convolution(out, maps[1:], windows[2::2], taps, biases, base=maps[0], which=last),
    ]


def _plan_backward(
    grad_x: Tensor,
    grad_out: Tensor,
    x: Tensor,
    taps: Tensor,
    biases: Tensor,
    scaled: Tensor | None,
    scale: Tensor | None,
    kernel_size: list[int],
    strip_lengths: list[int],
) -> tuple[list[Launch], Tensor, list[Tensor]]:
    """The launches, their sums for the taps [parts, C, taps], and the maps whose sums are the biases' gradients."""
    windows, pairs = _windows(kernel_size, strip_lengths), len(strip_lengths)
    maps, others = _maps(grad_x, 1 + pairs), _maps(grad_x, 1 + pairs)  # a, h_i; da, u_i
    launches = list(_rows_of(x, taps, biases, windows, maps))
    for i, window in enumerate(windows[2::2]):
        launches.append(_convolution(others[1 + i], grad_out[None], [window], taps, biases, reverse=True))
    adjoint: dict[str, Any] = {"taps": taps, "biases": biases, "reverse": True}
    launches.append(_convolution(others[0], others[1:], windows[1::2], base=grad_out, **adjoint))
    launches.append(_convolution(grad_x, others[:1], windows[:1], scaled=scaled, scale=scale, **adjoint))

    common = _common(grad_x)
    steps = triton.cdiv(common["count"], common["BLOCK_P"])
    count = min(triton.cdiv(steps, 8), 64)
    steps = triton.cdiv(steps, count)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = torch.empty((count, *taps.shape), dtype=acc, device=x.device)

    def sums(window: tuple[int, int, int], fixed: Tensor, seen: Tensor) -> Launch:
        height, width, first = window
        args: dict[str, Any] = {"parts": parts, "fixed": fixed, "seen": seen, "steps": steps}
        args |= {f"{name}_strides": args[name].stride() for name in ("parts", "fixed", "seen")}
        args |= {"HEIGHT": height, "WIDTH": width, "FIRST": first, **common}
        return Launch(_sum_taps, (count * common["blocks"] * height * width,), args)

    launches.append(sums(windows[0], others[0], x))
    sum_of = [others[0]]
    for i in range(pairs):
        launches.append(sums(windows[1 + 2 * i], others[1 + i], maps[0]))
        launches.append(sums(windows[2 + 2 * i], grad_out, maps[1 + i]))
        sum_of += [others[1 + i], grad_out]
    return launches, parts, sum_of


def aot_cases() -> list[tuple[str, Launch]]:
    """The shipped configurations, named multi_scale_strip_conv/kernel/dtype/layout. Shapes: MSCAN's first stage."""
    cases = []
    for dtype, layout in (("bf16", "channels_last"), ("bf16", "nchw"), ("fp32", "channels_last")):
        x = torch.empty(8, 64, 128, 128, dtype=_DTYPES[dtype], device="meta")
        x = x.to(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
        taps, biases = (
            torch.empty(64, 103, dtype=x.dtype, device="meta"),
            torch.empty(64, 7, dtype=x.dtype, device="meta"),
        )
        a, across, *_, down = _plan_forward(x, x, taps, biases, [5, 5], [7, 11, 21])
        launches, _, _ = _plan_backward(x, x, x, taps, biases, x, x, [5, 5], [7, 11, 21])
        named = {"centre": a, "across": across, "down": down, "backward_across": launches[7], "backward": launches[8]}
        named |= {"taps": launches[9]}
        cases += [(f"multi_scale_strip_conv/{name}/{dtype}/{layout}", launch) for name, launch in named.items()]
    return cases


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
