"""Multi-scale strip convolution: the public function, then the op behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _dispatch
from .._dispatch import Compiled, Op
from ..reference.multi_scale_strip_conv import multi_scale_strip_conv as reference
from ._gradients import differentiate_through_reference, pull_back
from ._strips import Strip, backward_flops, empty_gradients, empty_like_input, flops, pack, why_not, why_not_backward

__all__ = ["multi_scale_strip_conv"]


def multi_scale_strip_conv(x: Tensor, weight: Tensor, bias: Tensor | None, strips: Sequence[Strip]) -> Tensor:
    """Depthwise convolution plus pairs of depthwise strips over its result, fused: no intermediate map is stored.

    ``a = dw(x, weight) + bias`` and ``out = a + sum_i dw_kx1(dw_1xk(a))``, each strip with its bias, stride 1, zero
    padding that keeps H and W (SegNeXt, section 3.1 and fig. 2). The k x 1 convolution of a pair sees zeros outside the
    map, not the 1 x k convolution's bias.

    Args:
        x: [N, C, H, W], any strides, any H, W >= 1; float16, bfloat16, float32 or float64.
        weight: [C, 1, kh, kw], both odd; 5 x 5 in SegNeXt.
        bias: [C] or None.
        strips: Any number of (w_1xk [C, 1, 1, k], bias [C] or None, w_kx1 [C, 1, k, 1], bias [C] or None), k odd and
            of any length; 7, 11 and 21 in SegNeXt.

    Returns:
        [N, C, H, W] in x's dtype, channels_last if x is.

    Raises:
        ValueError: shapes that do not fit, or an even kernel.
        TypeError: dtypes that differ, or are not floating-point; a strip that is not of four.

    Gradients reach x and every weight and bias, twice; those of the weights are sums over the map in a fixed order.
    The result is the same, bit for bit, on every run; sums run in float32 (float64 for float64). Backward stores
    nothing but x and computes the intermediate maps again. Backends: C++ (CPU), CUDA C++ and Triton (GPU; Triton alone
    stores the maps between the convolutions); ``segops.explain`` says which. Under autocast every tensor is cast to the
    autocast dtype.

    Example:
        >>> x, weight, bias = torch.randn(2, 32, 24, 40), torch.randn(32, 1, 5, 5), torch.randn(32)
        >>> strips = [(torch.randn(32, 1, 1, k), None, torch.randn(32, 1, k, 1), None) for k in (7, 11, 21)]
        >>> segops.multi_scale_strip_conv(x, weight, bias, strips).shape
        torch.Size([2, 32, 24, 40])
    """
    return OP(x, *pack("multi_scale_strip_conv", x, weight, bias, strips))


def _fake(x, taps, biases, kernel_size, strip_lengths):
    return empty_like_input(x)


def _fake_backward(grad_out, x, taps, biases, kernel_size, strip_lengths):
    return empty_gradients(x, taps, biases)


def _reference_backward(grad_out, x, taps, biases, kernel_size, strip_lengths):
    def out(x, taps, biases):
        return (reference(x, taps, biases, kernel_size, strip_lengths),)

    return pull_back(out, (x, taps, biases), (grad_out,))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.strip_lengths = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out):
    if grad_out is None:
        return (None,) * 5
    return (*BACKWARD(grad_out, *ctx.saved_tensors, ctx.kernel_size, ctx.strip_lengths), None, None)


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(x, taps, biases, kernel_size, strip_lengths):
        out = empty_like_input(x)
        compiled.multi_scale_strip_conv(out, x, taps, biases, kernel_size, strip_lengths)
        return out

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_out, x, taps, biases, kernel_size, strip_lengths):
        gradients = empty_gradients(x, taps, biases)
        windows = (kernel_size, strip_lengths)
        compiled.multi_scale_strip_conv_backward(*gradients, grad_out, x, taps, biases, None, None, *windows)
        return gradients

    return run


def _triton(x, taps, biases, kernel_size, strip_lengths):
    out = empty_like_input(x)
    _dispatch.kernels("multi_scale_strip_conv").forward(out, x, taps, biases, kernel_size, strip_lengths)
    return out


def _triton_backward(grad_out, x, taps, biases, kernel_size, strip_lengths):
    gradients = empty_gradients(x, taps, biases)
    windows = (kernel_size, strip_lengths)
    _dispatch.kernels("multi_scale_strip_conv").backward(*gradients, grad_out, x, taps, biases, None, None, *windows)
    return gradients


OP = Op(
    "multi_scale_strip_conv",
    "(Tensor x, Tensor taps, Tensor biases, int[2] kernel_size, int[] strip_lengths) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(
        native=Compiled("multi_scale_strip_conv", _native), triton=_triton, why_not=why_not, cuda_first=True
    ),
    autocast=("x", "taps", "biases"),
    flops=lambda x, taps, biases, *windows: flops(x, *windows),
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    "multi_scale_strip_conv_backward",
    "(Tensor grad_out, Tensor x, Tensor taps, Tensor biases, int[2] kernel_size, int[] strip_lengths) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled("multi_scale_strip_conv_backward", _native_backward),
        triton=_triton_backward,
        why_not=why_not_backward,
        cuda_first=True,
    ),
    flops=lambda grad_out, x, taps, biases, *windows: backward_flops(x, *windows),
)
differentiate_through_reference(BACKWARD, ("grad_out", "x", "taps", "biases"))
