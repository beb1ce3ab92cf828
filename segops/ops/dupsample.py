"""Data-dependent upsampling: the public function, then the op behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._dispatch import Compiled, Op
from ..reference.dupsample import check_temperature
from ..reference.dupsample import dupsample as reference
from ._gradients import differentiate_through_reference, pull_back
from ._head import backward_flops, check_head, check_size, contiguous, empty_gradients, flops
from ._losses import accumulator, why_not

__all__ = ["dupsample"]


def dupsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale_factor: int,
    temperature: Tensor | float | None = None,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """DUpsampling: a 1x1 convolution to ``r * r * K`` channels whose outputs are laid out as windows of r x r pixels.

    ``out[n, k, r i + dy, r j + dx] = (<weight[(dy r + dx) K + k], x[n, :, i, j]> + bias[(dy r + dx) K + k]) /
    temperature`` (DUpsampling, section 3.1; the class varies fastest, as when a window of one-hot labels is flattened).
    PixelShuffle orders the channels ``k r r + dy r + dx``: rows are permuted between the two.

    To train or predict, take :func:`segops.dupsample_cross_entropy` and :func:`segops.dupsample_argmax`: they do not
    store the logits.

    Args:
        x: [N, C, h, w], any strides; float16, bfloat16, float32 or float64.
        weight: [r * r * K, C] or [r * r * K, C, 1, 1], x's dtype.
        bias: [r * r * K], x's dtype.
        scale_factor: r, pixels per cell and axis.
        temperature: A number, or one element [] or [1] of any floating-point dtype; not 0, may be negative. None
            means 1.
        size: (H, W) of the output, or one int for both; r (h - 1) < H <= r h and the same for W. The map is cropped
            at the bottom and on the right. None means (r h, r w).

    Returns:
        [N, K, H, W] in x's dtype, channels_last if x is.

    Raises:
        ValueError: a scale_factor whose square does not divide weight's rows, shapes that do not fit, a size out of
            range, a temperature of 0 or NaN (in a tensor: read on the CPU only).
        TypeError: dtypes that differ, or are not floating-point.

    Gradients reach x, weight, bias and temperature, twice. The result is the same, bit for bit, on every run; sums run
    in float32 (float64 for float64). Backends: C++ (CPU), Triton and CUDA C++ (GPU); ``segops.explain`` says which.
    Under autocast x, weight and bias are cast to the autocast dtype, the temperature is not.

    Example:
        >>> x, weight = torch.randn(2, 64, 9, 13), torch.randn(8 * 8 * 21, 64)
        >>> segops.dupsample(x, weight, scale_factor=8, size=(72, 101)).shape
        torch.Size([2, 21, 72, 101])
    """
    name = "dupsample"
    weight, temperature = check_head(name, x, weight, bias, scale_factor, temperature)
    if size is None:
        size = (x.shape[2] * scale_factor, x.shape[3] * scale_factor)
    else:
        size = _checks.pair(name, "size", size)
        check_size(name, "size", x, scale_factor, size)
    return OP(x, weight, bias, temperature, scale_factor, list(size))


def _empty(x: Tensor, weight: Tensor, scale_factor: int, size: list[int]) -> Tensor:
    channels_last = x.shape[1] > 1 and x.stride(1) == 1
    return torch.empty(
        (x.shape[0], weight.shape[0] // scale_factor**2, size[0], size[1]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _fake(x, weight, bias, temperature, scale_factor, size):
    return _empty(x, weight, scale_factor, size)


def _fake_backward(grad_out, x, weight, bias, temperature, scale_factor):
    return empty_gradients(x, weight, bias, temperature)


def _reference_backward(grad_out, x, weight, bias, temperature, scale_factor):
    def out(x, weight, bias, temperature):
        return (reference(x, weight, bias, temperature, scale_factor, list(grad_out.shape[2:])),)

    return pull_back(out, (x, weight, bias, temperature), (grad_out,))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale_factor, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out):
    if grad_out is None:
        return (None,) * 6
    x, weight, bias, temperature = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_temperature = BACKWARD(
        grad_out, x, weight, bias, temperature, ctx.scale_factor
    )
    return (
        grad_x, grad_weight, None if bias is None else grad_bias, None if temperature is None else grad_temperature,
        None, None,
    )  # fmt: skip


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(x, weight, bias, temperature, scale_factor, size):
        check_temperature("dupsample", temperature)
        out = _empty(x, weight, scale_factor, size)
        compiled.dupsample(out, x, weight, contiguous(bias), temperature, scale_factor)
        return out

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_out, x, weight, bias, temperature, scale_factor):
        gradients = empty_gradients(x, weight, bias, temperature)
        compiled.dupsample_backward(*gradients, grad_out, x, weight, contiguous(bias), temperature, scale_factor)
        return gradients

    return run


# CUDA C++ moves the columns; the matrix products are torch's.


def _cuda(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(x, weight, bias, temperature, scale_factor, size):
        check_temperature("dupsample", temperature)
        out = _empty(x, weight, scale_factor, size)
        columns = torch.matmul(weight, x.flatten(2))
        compiled.dupsample_rearrange(out, columns, contiguous(bias), temperature, scale_factor)
        return out

    return run


def _cuda_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_out, x, weight, bias, temperature, scale_factor):
        n, _, h, w = x.shape
        sums = accumulator(x.dtype)
        columns = torch.empty((n, weight.shape[0], h * w), dtype=x.dtype, device=x.device)
        compiled.dupsample_rearrange_backward(columns, grad_out, temperature, scale_factor)
        grad_x = torch.matmul(weight.t(), columns).view(x.shape)
        grad_weight = torch.einsum("nrp,ncp->rc", columns, x.flatten(2))
        absent = x.new_empty(0)
        bias_sum = absent if bias is None else columns.sum((0, 2), dtype=sums)
        grad_temperature = absent
        if temperature is not None:
            # sum over pixels of grad_out * -z / T, with z T = W x + b
            total = (grad_weight.to(sums) * weight).sum()
            total = total if bias is None else total + (bias_sum * bias).sum()
            grad_temperature = -total.view(temperature.shape) / temperature
        return grad_x, grad_weight, bias_sum.to(x.dtype), grad_temperature

    return run


def _triton(x, weight, bias, temperature, scale_factor, size):
    check_temperature("dupsample", temperature)
    out = _empty(x, weight, scale_factor, size)
    _dispatch.kernels("dupsample").forward(out, x, weight, contiguous(bias), temperature, scale_factor)
    return out


def _triton_backward(grad_out, x, weight, bias, temperature, scale_factor):
    gradients = empty_gradients(x, weight, bias, temperature)
    _dispatch.kernels("dupsample").backward(
        *gradients, grad_out, x, weight, contiguous(bias), temperature, scale_factor
    )
    return gradients


def _why_not_backward(grad_out: Tensor, *args: Any) -> str | None:
    return why_not(grad_out)


OP = Op(
    "dupsample",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? temperature, int scale_factor, SymInt[2] size) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(
        native=Compiled("dupsample", _native),
        triton=_triton,
        cuda=Compiled("dupsample_rearrange", _cuda),
        why_not=why_not,
    ),
    autocast=("x", "weight", "bias"),
    flops=flops,
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    "dupsample_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? temperature, int scale_factor) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled("dupsample_backward", _native_backward),
        triton=_triton_backward,
        cuda=Compiled("dupsample_rearrange_backward", _cuda_backward),
        why_not=_why_not_backward,
    ),
    flops=backward_flops,
)
differentiate_through_reference(BACKWARD, ("grad_out", "x", "weight", "bias", "temperature"))
