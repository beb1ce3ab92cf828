"""Axial attention: the public function, then the op behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks, _context, _dispatch
from .._dispatch import Compiled, Op
from ..reference.axial_attention import axial_attention as reference
from ._gradients import differentiate_through_reference, pull_back
from ._losses import accumulator, why_not

__all__ = ["axial_attention"]

NAME = "axial_attention"
COMBINES = ("compose", "sum", "joint")
AXES = ("height", "width")
CODES = ("h", "w", "hw", "wh")  # of the axes, for the native op
NO_CUDA = "no CUDA C++: matrix products want tensor cores, which are Triton's"


def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    scale: float | None = None,
    combine: str = "compose",
    order: Sequence[str] = ("height", "width"),
) -> Tensor:
    """Attention of every pixel along its column and its row, in place: no permuted copies, no attention map.

    Along one axis, ``out(p) = sum_j softmax_j(scale * <query(p), key(j)>) value(j)`` over the pixels j of p's column
    (``"height"``) or row (``"width"``), p included (HFGD, section 3.3; CAA; CCNet).

    Args:
        query: [N, num_heads * d, H, W], any strides, any H, W >= 1; float16, bfloat16, float32 or float64. A head's
            channels are consecutive.
        key: [N, num_heads * d, H, W].
        value: [N, num_heads * d_v, H, W]; d_v may differ from d.
        num_heads: Heads that the channels are split into.
        scale: Factor on the logits; None means 1 / sqrt(d). CAA and CCNet have none: pass 1.0 to follow them.
        combine: ``"compose"``: the second axis of ``order`` attends to the result of the first, both with maps from the
            given query and key. ``"sum"``: the sum of both axes' results. ``"joint"``: one softmax over column and row,
            the pixel itself counted once (criss-cross attention).
        order: Axes, the first one first. One alone, ``("height",)`` or ``("width",)``, is attention along that axis;
            a map of one row with ``("width",)`` is plain self-attention.

    Returns:
        [N, num_heads * d_v, H, W] in query's dtype, channels_last if query is. Differentiable, twice.

    Raises:
        ValueError: shapes that do not fit, an unknown combine or axis, an axis given twice, ``"joint"`` of one axis, a
            scale that is not finite.
        TypeError: dtypes that differ, or are not floating-point; a scale that is no number.

    Gradients reach query, key and value. Backward keeps these and the result, the log-sum-exps [N, num_heads, 1 or 2,
    H, W] and, for ``"compose"``, the first axis's result. Forward and backward use no atomics and give the same bits on
    every run; sums run in float32 (float64 for float64). Backends: C++ (CPU), Triton (GPU); ``segops.explain`` says
    which. Under autocast the inputs are cast to the autocast dtype.

    Example:
        >>> q, k, v = torch.randn(3, 2, 64, 33, 47).unbind()
        >>> segops.axial_attention(q, k, v, num_heads=2).shape
        torch.Size([2, 64, 33, 47])
        >>> segops.axial_attention(q[:, :8], k[:, :8], v, combine="joint", scale=1.0).shape
        torch.Size([2, 64, 33, 47])
    """
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(NAME, argument, tensor, "[N, C, H, W]")
    _checks.alike(NAME, "query", query, "key", key)
    _checks.alike(NAME, "query", query, "value", value)
    _checks.positive(NAME, "num_heads", num_heads)
    check_mode(NAME, scale, combine, order)
    n, c, h, w = query.shape
    if key.shape != query.shape:
        raise ValueError(f"{NAME}: key must have query's shape {tuple(query.shape)}, got {tuple(key.shape)}")
    if value.shape[0] != n or value.shape[2:] != query.shape[2:]:
        raise ValueError(f"{NAME}: value must be [{n}, C, {h}, {w}] as query is, got {tuple(value.shape)}")
    for argument, tensor in (("query", query), ("value", value)):
        if tensor.shape[1] < 1 or tensor.shape[1] % num_heads:
            raise ValueError(
                f"{NAME}: {argument} must have a multiple of num_heads={num_heads} channels, got {tensor.shape[1]}"
            )
    if h < 1 or w < 1:
        raise ValueError(f"{NAME}: query must have H, W >= 1, got {h} x {w}")
    if scale is None:
        scale = (c // num_heads) ** -0.5
    axes = "".join(axis[0] for axis in order)
    if len(axes) == 1:
        combine = "compose"
    elif combine != "compose":
        axes = "hw"
    training = _context.wants_gradient(query, key, value)
    return OP(query, key, value, num_heads, float(scale), combine, axes, training)[0]


def check_mode(name: str, scale: float | None, combine: str, order: Sequence[str]) -> None:
    """The settings of which the layer has its own copy."""
    if scale is not None:
        _checks.finite(name, "scale", scale)
    _checks.choice(name, "combine", combine, COMBINES)
    if isinstance(order, str) or not isinstance(order, Sequence):
        raise TypeError(f"{name}: order must be a tuple of 'height' and 'width', got {order!r}")
    for axis in order:
        _checks.choice(name, "order", axis, AXES)
    if len(order) not in (1, 2) or len(set(order)) != len(order):
        raise ValueError(f"{name}: order must hold 'height', 'width' or both, each once, got {tuple(order)!r}")
    if combine == "joint" and len(order) == 1:
        raise ValueError(f"{name}: combine='joint' is over both axes, got order={tuple(order)!r}")


# Outputs are allocated here for the fake kernel and for every backend, so that their strides cannot differ.


def _empty(
    query: Tensor, value: Tensor, num_heads: int, combine: str, axes: str, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = query.shape
    channels_last = query.shape[1] > 1 and query.stride(1) == 1
    out = torch.empty(
        value.shape,
        dtype=query.dtype,
        device=query.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    first = torch.empty_like(out) if training and _keeps_first(combine, axes) else query.new_empty(0)
    softmaxes = 1 if combine == "joint" else len(axes)
    lse = torch.empty((n, num_heads, softmaxes, h, w), dtype=accumulator(query.dtype), device=query.device)
    return out, first, lse


def _keeps_first(combine: str, axes: str) -> bool:
    """Whether the second axis, and so its backward, reads the first one's result."""
    return combine == "compose" and len(axes) == 2


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fake(query, key, value, num_heads, scale, combine, axes, training):
    return _empty(query, value, num_heads, combine, axes, training)


def _fake_backward(grad_out, query, key, value, *saved_and_settings):
    return _empty_gradients(query, key, value)


def _reference_backward(grad_out, query, key, value, out, first, lse, *settings):
    return pull_back(lambda *inputs: reference(*inputs, *settings)[:1], (query, key, value), (grad_out,))


def _setup_context(ctx, inputs, output):
    query, key, value, *ctx.settings, ctx.training = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 8
    if not ctx.training:
        raise RuntimeError(f"segops::{NAME}: a gradient is wanted, but training=False kept nothing for it")
    return (*BACKWARD(grad_out, *ctx.saved_tensors, *ctx.settings), *(None,) * 5)


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(query, key, value, num_heads, scale, combine, axes, training):
        outputs = _empty(query, value, num_heads, combine, axes, training)
        settings = (num_heads, scale, COMBINES.index(combine), CODES.index(axes))
        compiled.axial_attention(*outputs, query, key, value, *settings)
        return outputs

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_out, query, key, value, out, first, lse, num_heads, scale, combine, axes):
        gradients = _empty_gradients(query, key, value)
        settings = (num_heads, scale, COMBINES.index(combine), CODES.index(axes))
        compiled.axial_attention_backward(*gradients, grad_out, query, key, value, out, first, lse, *settings)
        return gradients

    return run


def _triton(query, key, value, num_heads, scale, combine, axes, training):
    outputs = _empty(query, value, num_heads, combine, axes, training)
    _dispatch.kernels(NAME).forward(*outputs, query, key, value, num_heads, scale, combine, axes)
    return outputs


def _triton_backward(grad_out, query, key, value, *saved_and_settings):
    gradients = _empty_gradients(query, key, value)
    _dispatch.kernels(NAME).backward(*gradients, grad_out, query, key, value, *saved_and_settings)
    return gradients


def _flops(query, key, value, num_heads, scale, combine, axes, *training):
    """Of the two products along each axis, from shapes."""
    n, c, h, w = query
    lengths = sum({"h": h, "w": w}[axis] for axis in axes)
    return 2 * n * h * w * (c + value[1]) * lengths


def _backward_flops(grad_out, query, key, value, out, first, lse, *settings):
    return 2 * _flops(query, key, value, *settings)


OP = Op(
    NAME,
    "(Tensor query, Tensor key, Tensor value, int num_heads, float scale, str combine, str axes, bool training) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(native=Compiled(NAME, _native), triton=_triton, cuda=NO_CUDA, why_not=why_not),
    autocast=("query", "key", "value"),
    flops=_flops,
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    f"{NAME}_backward",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor first, Tensor lse, int num_heads, "
    "float scale, str combine, str axes) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled(f"{NAME}_backward", _native_backward), triton=_triton_backward, cuda=NO_CUDA, why_not=why_not
    ),
    flops=_backward_flops,
)
differentiate_through_reference(BACKWARD, ("grad_out", "query", "key", "value"), saved=("out", "first", "lse"))
