"""Dilated local attention: the public function, then the op behind it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._dispatch import Compiled, Op
from ..reference.local_attention import local_attention as reference
from ._gradients import differentiate_through_reference, pull_back

__all__ = ["local_attention"]

BORDERS = ("zero", "mask", "shift")


@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    border: str = "zero",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    border: str = "zero",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    border: str = "zero",
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    border: str = "zero",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every pixel to a dilated window around it, fused: no unfolded keys, no attention map.

    ``out(p) = sum_n softmax_n(scale * <query(p), key(p + offset_n)>) value(p + offset_n)`` over the
    ``kernel_size[0] * kernel_size[1]`` taps, the centre included (GALD, eq. 6-8, called LDv2 there).

    Args:
        query: [N, num_heads * d, H, W], any strides, any H, W >= 1; float16, bfloat16, float32 or float64. A head's
            channels are consecutive.
        key: [N, num_heads * d, H, W].
        value: [N, num_heads * d_v, H, W]; d_v may differ from d.
        kernel_size: Taps per axis, (height, width) or one int for both; odd.
        dilation: Distance between taps in pixels, (height, width) or one int for both.
        num_heads: Heads that the channels are split into.
        scale: Factor on the logits; None means 1 / sqrt(d). GALD has none: pass 1.0 to follow the paper.
        border: What a tap outside the map is. ``"zero"``: a tap with logit 0 and value 0, which takes part in the
            softmax (zero padding after the projections, as in LDv2). ``"mask"``: no tap. ``"shift"``: the window is
            pushed back inside the map (NATTEN's rule).
        return_lse: Also return the log-sum-exp of the logits, padded ones included.

    Returns:
        out [N, num_heads * d_v, H, W] in query's dtype, channels_last if query is; with ``return_lse`` also lse
        [N, num_heads, H, W], float32 (float64 for float64). Both are differentiable, twice.

    Raises:
        ValueError: shapes that do not fit, an even kernel_size, an unknown border, or ``border="shift"`` with
            kernel_size * dilation larger than the map.
        TypeError: dtypes that differ, or are not floating-point.

    Gradients reach query, key and value. Forward and backward use no atomics and give the same bits on every run;
    sums run in float32 (float64 for float64). Backends: C++ (CPU), Triton and CUDA C++ (GPU); ``segops.explain`` says
    which. Under autocast the inputs are cast to the autocast dtype.

    Example:
        >>> q, k, v = torch.randn(3, 2, 64, 33, 47).unbind()
        >>> segops.local_attention(q, k, v, kernel_size=5, dilation=6, num_heads=2).shape
        torch.Size([2, 64, 33, 47])
    """
    name = "local_attention"
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(name, argument, tensor, "[N, C, H, W]")
    _checks.alike(name, "query", query, "key", key)
    _checks.alike(name, "query", query, "value", value)
    _checks.positive(name, "num_heads", num_heads)
    _checks.choice(name, "border", border, BORDERS)
    kernel_size = _checks.pair(name, "kernel_size", kernel_size, odd=True)
    dilation = _checks.pair(name, "dilation", dilation)
    n, c, h, w = query.shape
    if key.shape != query.shape:
        raise ValueError(f"{name}: key must have query's shape {tuple(query.shape)}, got {tuple(key.shape)}")
    if value.shape[0] != n or value.shape[2:] != query.shape[2:]:
        raise ValueError(f"{name}: value must be [{n}, C, {h}, {w}] as query is, got {tuple(value.shape)}")
    for argument, tensor in (("query", query), ("value", value)):
        if tensor.shape[1] < 1 or tensor.shape[1] % num_heads:
            raise ValueError(
                f"{name}: {argument} must have a multiple of num_heads={num_heads} channels, got {tensor.shape[1]}"
            )
    if h < 1 or w < 1:
        raise ValueError(f"{name}: query must have H, W >= 1, got {h} x {w}")
    if border == "shift":
        for axis, length, taps, step in zip("HW", (h, w), kernel_size, dilation, strict=True):
            if taps * step > length:
                raise ValueError(
                    f"{name}: border='shift' needs kernel_size * dilation <= {axis}, got {taps} * {step} > {length};"
                    " border='zero' or 'mask' take any size"
                )
    if scale is None:
        scale = (c // num_heads) ** -0.5
    out, lse = OP(query, key, value, list(kernel_size), list(dilation), num_heads, float(scale), border)
    return (out, lse) if return_lse else out


# Outputs are allocated here for the fake kernel and for every backend, so that their strides cannot differ.


def _empty(query: Tensor, value: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    n, _, h, w = query.shape
    channels_last = query.shape[1] > 1 and query.stride(1) == 1
    out = torch.empty(
        value.shape,
        dtype=query.dtype,
        device=query.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, torch.empty((n, num_heads, h, w), dtype=lse_dtype, device=query.device)


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fake(query, key, value, kernel_size, dilation, num_heads, scale, border):
    return _empty(query, value, num_heads)


def _fake_backward(grad_out, grad_lse, query, key, value, out, lse, *window):
    return _empty_gradients(query, key, value)


def _reference_backward(grad_out, grad_lse, query, key, value, out, lse, *window):
    return pull_back(lambda *inputs: reference(*inputs, *window), (query, key, value), (grad_out, grad_lse))


def _setup_context(ctx, inputs, output):
    query, key, value, *window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output)
    ctx.window = window


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = BACKWARD(grad_out, grad_lse, query, key, value, out, lse, *ctx.window)
    return (*gradients, *(None,) * 5)


def _why_not(query: Tensor, *args: Any) -> str | None:
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"dtype {query.dtype}"
    return None


def _why_not_backward(grad_out: Tensor, *args: Any) -> str | None:
    return _why_not(grad_out)


def _native_forward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(query, key, value, kernel_size, dilation, num_heads, scale, border):
        out, lse = _empty(query, value, num_heads)
        window = (kernel_size, dilation, num_heads, scale, BORDERS.index(border))
        compiled.local_attention(out, lse, query, key, value, *window)
        return out, lse

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_out, grad_lse, query, key, value, out, lse, kernel_size, dilation, num_heads, scale, border):
        gradients = _empty_gradients(query, key, value)
        window = (kernel_size, dilation, num_heads, scale, BORDERS.index(border))
        compiled.local_attention_backward(*gradients, grad_out, grad_lse, query, key, value, out, lse, *window)
        return gradients

    return run


def _triton_forward(query, key, value, *window):
    out, lse = _empty(query, value, window[2])
    _dispatch.kernels("local_attention").forward(out, lse, query, key, value, *window)
    return out, lse


def _triton_backward(grad_out, grad_lse, query, key, value, out, lse, *window):
    gradients = _empty_gradients(query, key, value)
    _dispatch.kernels("local_attention").backward(*gradients, grad_out, grad_lse, query, key, value, out, lse, *window)
    return gradients


def _flops(query, key, value, kernel_size, *settings):
    """Of the two products with the taps, from shapes."""
    n, _, h, w = query
    return 2 * n * h * w * (query[1] + value[1]) * kernel_size[0] * kernel_size[1]


def _backward_flops(grad_out, grad_lse, query, key, value, out, lse, kernel_size, *settings):
    return 2 * _flops(query, key, value, kernel_size)


OP = Op(
    "local_attention",
    "(Tensor query, Tensor key, Tensor value, int[2] kernel_size, int[2] dilation, int num_heads, float scale, "
    "str border) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(
        native=Compiled("local_attention", _native_forward),
        triton=_triton_forward,
        why_not=_why_not,
    ),
    autocast=("query", "key", "value"),
    flops=_flops,
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    "local_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "int[2] kernel_size, int[2] dilation, int num_heads, float scale, str border) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled("local_attention_backward", _native_backward),
        triton=_triton_backward,
        why_not=_why_not_backward,
    ),
    flops=_backward_flops,
)
differentiate_through_reference(BACKWARD, ("grad_out", "grad_lse", "query", "key", "value"), saved=("out", "lse"))
