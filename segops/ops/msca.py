"""Multi-scale convolutional attention: the public function, then the op behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _context, _dispatch
from .._dispatch import Compiled, Op
from ..reference.msca import msca as reference
from . import multi_scale_strip_conv as strips
from ._gradients import differentiate_through_reference, pull_back
from ._strips import Strip, backward_flops, empty_gradients, empty_like_input, flops, pack, why_not, why_not_backward

__all__ = ["msca"]


def msca(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strips: Sequence[Strip],
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
) -> Tensor:
    """SegNeXt's attention: ``(W3 @ multi_scale_strip_conv(x, weight, bias, strips) + b3) * x``.

    Args:
        x: [N, C, H, W], any strides, any H, W >= 1; float16, bfloat16, float32 or float64.
        weight: [C, 1, kh, kw], both odd; 5 x 5 in SegNeXt.
        bias: [C] or None.
        strips: Any number of (w_1xk [C, 1, 1, k], bias [C] or None, w_kx1 [C, 1, k, 1], bias [C] or None), k odd; see
            :func:`segops.multi_scale_strip_conv`, also for the borders.
        proj_weight: W3 [C, C] or [C, C, 1, 1].
        proj_bias: b3 [C] or None.

    Returns:
        [N, C, H, W] in x's dtype, channels_last if x is.

    Raises:
        ValueError: shapes that do not fit, or an even kernel.
        TypeError: dtypes that differ, or are not floating-point; a strip that is not of four.

    Gradients reach x and every weight and bias, twice. Backward keeps x and two maps of its size (the strips' result
    and the gate); where no gradient is wanted, none is kept. The result is the same, bit for bit, on every run; the
    depthwise part sums in float32 (float64 for float64), the 1x1 convolution is torch's. Backends: C++ (CPU), Triton
    and CUDA C++ (GPU); ``segops.explain`` says which. Under autocast every tensor is cast to the autocast dtype.

    Example:
        >>> x, weight, proj = torch.randn(2, 32, 24, 40), torch.randn(32, 1, 5, 5), torch.randn(32, 32)
        >>> strips = [(torch.randn(32, 1, 1, k), None, torch.randn(32, 1, k, 1), None) for k in (7, 11, 21)]
        >>> segops.msca(x, weight, None, strips, proj).shape
        torch.Size([2, 32, 24, 40])
    """
    name = "msca"
    taps, biases, kernel_size, strip_lengths = pack(name, x, weight, bias, strips)
    c = x.shape[1]
    if isinstance(proj_weight, Tensor) and proj_weight.dim() == 4 and proj_weight.shape[2:] == (1, 1):
        proj_weight = proj_weight.flatten(1)
    _checks.tensor(name, "proj_weight", proj_weight, f"[{c}, {c}]")
    if proj_weight.shape != (c, c):
        raise ValueError(f"{name}: proj_weight must be [{c}, {c}] or [{c}, {c}, 1, 1], got {tuple(proj_weight.shape)}")
    _checks.alike(name, "x", x, "proj_weight", proj_weight)
    if proj_bias is not None:
        _checks.tensor(name, "proj_bias", proj_bias, f"[{c}]")
        if proj_bias.shape[0] != c:
            raise ValueError(f"{name}: proj_bias must be [{c}], got {tuple(proj_bias.shape)}")
        _checks.alike(name, "x", x, "proj_bias", proj_bias)
    tensors = (x, taps, biases, proj_weight, proj_bias)
    training = _context.wants_gradient(*tensors)
    return OP(*tensors, kernel_size, strip_lengths, training)[0]


def _empty(x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = empty_like_input(x)
    return (out, torch.empty_like(out), torch.empty_like(out)) if training else (out, x.new_empty(0), x.new_empty(0))


def _empty_gradients(x, taps, biases, proj_weight, proj_bias):
    absent = x.new_empty(0)
    proj = (torch.empty_like(proj_weight), absent if proj_bias is None else torch.empty_like(proj_bias))
    return (*empty_gradients(x, taps, biases), *proj)


def _fake(x, taps, biases, proj_weight, proj_bias, kernel_size, strip_lengths, training):
    return _empty(x, training)


def _fake_backward(grad_out, x, taps, biases, proj_weight, proj_bias, sums, gate, kernel_size, strip_lengths):
    return _empty_gradients(x, taps, biases, proj_weight, proj_bias)


def _reference_backward(grad_out, x, taps, biases, proj_weight, proj_bias, sums, gate, kernel_size, strip_lengths):
    def out(x, taps, biases, proj_weight, proj_bias):
        return (reference(x, taps, biases, proj_weight, proj_bias, kernel_size, strip_lengths, False)[0],)

    return pull_back(out, (x, taps, biases, proj_weight, proj_bias), (grad_out,))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.strip_lengths, ctx.training = inputs
    _, sums, gate = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, gate)
    ctx.save_for_backward(*tensors, sums, gate)


def _backward(ctx, grad_out, grad_sums, grad_gate):
    if grad_out is None:
        return (None,) * 8
    if not ctx.training:
        raise RuntimeError("segops::msca: a gradient is wanted, but training=False kept nothing for it")
    *gradients, grad_proj_bias = BACKWARD(grad_out, *ctx.saved_tensors, ctx.kernel_size, ctx.strip_lengths)
    return (*gradients, None if ctx.saved_tensors[4] is None else grad_proj_bias, None, None, None)


def _proj_flops(x: Sequence[int]) -> int:
    return 2 * math.prod(x) * x[1]


def _flops(x, taps, biases, proj_weight, proj_bias, kernel_size, strip_lengths, training):
    return flops(x, kernel_size, strip_lengths) + _proj_flops(x)


def _backward_flops(grad_out, x, taps, biases, proj_weight, proj_bias, sums, gate, kernel_size, strip_lengths):
    return backward_flops(x, kernel_size, strip_lengths) + 2 * _proj_flops(x)


# The matrix products are torch's, on the layout that the strips wrote.


def _by_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] whose channels are adjacent, as [N H W, C]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _adjacent(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _project(s: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of a dense map, in its layout; may write into ``out``."""
    if _adjacent(s):
        return F.conv2d(s, weight[:, :, None, None], bias)
    columns, weights = s.flatten(2), weight.expand(s.shape[0], -1, -1)
    to = None if out is None else out.flatten(2)
    if bias is None:
        return torch.bmm(weights, columns, out=to).view(s.shape)
    return torch.baddbmm(bias[:, None], weights, columns, out=to).view(s.shape)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """sum over pixels of a b^T, of dense maps of one layout: [C, C]."""
    if _adjacent(a):
        return _by_rows(a).t() @ _by_rows(b)
    return torch.bmm(a.flatten(2), b.flatten(2).mT).sum(0)


_CHUNK = 8 << 20  # bytes of images that a core finds in its cache again


def _native(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(x, taps, biases, proj_weight, proj_bias, kernel_size, strip_lengths, training):
        windows = (kernel_size, strip_lengths)
        if training:
            sums = empty_like_input(x)
            compiled.multi_scale_strip_conv(sums, x, taps, biases, *windows)
            gate = _project(sums, proj_weight, proj_bias)
            return torch.mul(gate, x, out=torch.empty_like(gate)), sums, gate
        out = empty_like_input(x)
        some = max(_CHUNK // max(x[:1].nbytes, 1), 1) if x.device.type == "cpu" else max(x.shape[0], 1)
        sums = empty_like_input(x[:some])
        for part, images in zip(out.split(some), x.split(some), strict=True):
            s = sums[: images.shape[0]]
            compiled.multi_scale_strip_conv(s, images, taps, biases, *windows)
            torch.mul(_project(s, proj_weight, proj_bias, part), images, out=part)
        return out, x.new_empty(0), x.new_empty(0)

    return run


def _native_backward(namespace):
    compiled = getattr(torch.ops, namespace)

    def run(grad_out, x, taps, biases, proj_weight, proj_bias, sums, gate, kernel_size, strip_lengths):
        gradients = empty_gradients(x, taps, biases)
        grad_gate = torch.mul(grad_out, x, out=torch.empty_like(gate))
        grad_sums = _project(grad_gate, proj_weight.t(), None)
        proj = (_outer(grad_gate, sums), x.new_empty(0) if proj_bias is None else grad_gate.sum((0, 2, 3)))
        del grad_gate
        windows = (kernel_size, strip_lengths)
        compiled.multi_scale_strip_conv_backward(*gradients, grad_sums, x, taps, biases, grad_out, gate, *windows)
        return (*gradients, *proj)

    return run


def _triton(x, taps, biases, proj_weight, proj_bias, kernel_size, strip_lengths, training):
    out, _, gate = _empty(x, training)
    # By whichever backend the strips prefer: CUDA C++ keeps their maps in shared memory.
    sums = strips.OP.overload(x, taps, biases, kernel_size, strip_lengths)
    _dispatch.kernels("msca").forward(out, gate, sums, x, proj_weight, proj_bias)
    return out, sums if training else x.new_empty(0), gate


def _triton_backward(*args):
    gradients = _empty_gradients(*args[1:6])
    _dispatch.kernels("msca").backward(*gradients, *args)
    return gradients


OP = Op(
    "msca",
    "(Tensor x, Tensor taps, Tensor biases, Tensor proj_weight, Tensor? proj_bias, int[2] kernel_size, "
    "int[] strip_lengths, bool training) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=_dispatch.backends(native=Compiled("multi_scale_strip_conv", _native), triton=_triton, why_not=why_not),
    autocast=("x", "taps", "biases", "proj_weight", "proj_bias"),
    flops=_flops,
)
OP.register_autograd(_backward, _setup_context)

BACKWARD = Op(
    "msca_backward",
    "(Tensor grad_out, Tensor x, Tensor taps, Tensor biases, Tensor proj_weight, Tensor? proj_bias, Tensor sums, "
    "Tensor gate, int[2] kernel_size, int[] strip_lengths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    backends=_dispatch.backends(
        native=Compiled("multi_scale_strip_conv_backward", _native_backward),
        triton=_triton_backward,
        why_not=why_not_backward,
        cuda_first=True,
    ),
    flops=_backward_flops,
)
differentiate_through_reference(
    BACKWARD, ("grad_out", "x", "taps", "biases", "proj_weight", "proj_bias"), saved=("sums", "gate")
)
