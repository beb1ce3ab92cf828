"""multi_scale_strip_conv's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import segops
from segops import multi_scale_strip_conv
from segops.reference._sample import Sample
from segops.reference.multi_scale_strip_conv import depthwise

from .lanes import every_lane


def drawn(shape, *args, dtype=torch.float64, device="cpu", seed=0, **kwargs):
    return Sample("", depthwise(shape, *args, **kwargs), scale=0.5).tensors(dtype, device, seed)


def literal(x, weight, bias, strips):
    """semantics.md 5.1 word by word: loops over pixels and taps, zeros outside the map."""

    def convolved(x, weight, bias):
        h, w = x.shape[2:]
        kh, kw = weight.shape[2:]
        out = torch.zeros_like(x)
        for y, z, i, j in itertools.product(range(h), range(w), range(kh), range(kw)):
            row, column = y + i - kh // 2, z + j - kw // 2
            if 0 <= row < h and 0 <= column < w:
                out[:, :, y, z] += weight[:, 0, i, j] * x[:, :, row, column]
        return out if bias is None else out + bias[:, None, None]

    a = convolved(x, weight, bias)
    return a + sum(convolved(convolved(a, across, b), down, d) for across, b, down, d in strips)


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (1, 2, 3, 11), (1, 1, 1, 1)], ids=str)
def test_reference_is_the_formula(shape):
    tensors = drawn(shape, (3, 5), (5, 9))
    with segops.use_backend("reference"):
        torch.testing.assert_close(multi_scale_strip_conv(**tensors), literal(**tensors), rtol=1e-12, atol=1e-12)


@every_lane
def test_a_single_tap_returns_its_input(lane):
    x = torch.randn(2, 5, 6, 7, device=lane.device)
    one = torch.zeros(5, 1, 3, 5, device=lane.device)
    one[:, :, 1, 2] = 1
    across = torch.zeros(5, 1, 1, 7, device=lane.device)
    across[..., 3] = 1
    with lane.active():
        assert torch.equal(multi_scale_strip_conv(x, one, None, []), x)
        strips = [(across, None, across.mT.contiguous(), None)] * 2
        torch.testing.assert_close(multi_scale_strip_conv(x, one, None, strips), 3 * x)


@every_lane
def test_the_second_strip_sees_zeros_outside_the_map(lane):
    """Of a map of zeros what remains is the 1 x k bias, times the k x 1 taps whose row exists."""
    h, k = 6, 5
    x, weight = torch.zeros(1, 2, h, 4, device=lane.device), torch.zeros(2, 1, 3, 3, device=lane.device)
    across = torch.zeros(2, 1, 1, k, device=lane.device)
    bias = torch.tensor([2.0, -1.0], device=lane.device)
    with lane.active():
        out = multi_scale_strip_conv(x, weight, None, [(across, bias, torch.ones_like(across).mT, None)])
    rows = torch.tensor([3.0, 4, 5, 5, 4, 3], device=lane.device)
    torch.testing.assert_close(out, (bias[:, None, None] * rows[:, None]).expand(2, h, 4)[None])


@every_lane
def test_mirrored_input_and_taps_give_mirrored_output(lane):
    tensors = drawn((1, 3, 7, 9), (3, 5), (5, 11), device=lane.device)
    mirrored = tree_map_only(torch.Tensor, lambda t: t.flip(2, 3) if t.dim() == 4 else t, tensors)
    with lane.active():
        out = multi_scale_strip_conv(**mirrored).flip(2, 3)
        torch.testing.assert_close(out, multi_scale_strip_conv(**tensors), rtol=1e-12, atol=1e-12)


@every_lane
def test_nan_stays_within_reach(lane):
    tensors = drawn((1, 2, 9, 12), (3, 3), (5,), dtype=torch.float32, device=lane.device)
    tensors["x"][0, 0, 4, 6] = torch.nan
    with lane.active():
        out = multi_scale_strip_conv(**tensors)
    hit = torch.zeros(9, 12, dtype=torch.bool)
    hit[1:8, 3:10] = True
    assert torch.equal(out[0, 0].isnan().cpu(), hit)
    assert out[0, 1].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 3, 7]), st.lists(st.sampled_from([1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 33]), max_size=4),
    st.booleans(),
)  # fmt: skip
def test_any_shape_on_cpu(n, c, h, w, kh, kw, lengths, bias):
    check_on_cpu((n, c, h, w), (kh, kw), lengths, bias)


@pytest.mark.parametrize("shape", [(1, 2, 300, 3), (1, 3, 4, 900), (1, 1, 130, 400)], ids=str)
def test_tiles_and_pieces_on_cpu(shape):
    """Maps so long that rows, columns or both are worked on in parts."""
    check_on_cpu(shape, (5, 5), (7, 11, 21), True)


def check_on_cpu(shape, kernel_size, lengths, bias):
    tensors = drawn(shape, kernel_size, tuple(lengths), bias=bias)
    leaves = [t.requires_grad_() for t in tree_leaves(tensors) if t is not None]
    found = []
    for backend in ("cpu", "reference"):
        with segops.use_backend(backend):
            out = multi_scale_strip_conv(**tensors)
            weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
            found.append((out, *torch.autograd.grad(out, leaves, weights)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    c = 4100
    x = torch.randn(1, 1, 512, 1024, device=device).bfloat16().expand(1, c, 512, 1024)
    assert x.numel() > 2**31
    weight = torch.full((c, 1, 1, 1), 0.5, dtype=torch.bfloat16, device=device)
    with segops.use_backend(backend), torch.no_grad():
        out = multi_scale_strip_conv(x, weight, None, [])
    assert torch.equal(out[:, ::4099], 0.5 * x[:, ::4099])


def test_output_follows_the_inputs_layout():
    tensors = drawn((2, 8, 5, 6), dtype=torch.float32)
    x = tensors.pop("x")
    last = multi_scale_strip_conv(x.to(memory_format=torch.channels_last), **tensors)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert multi_scale_strip_conv(x, **tensors).is_contiguous()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_flops_are_those_of_the_convolutions(backward):
    tensors = tree_map_only(torch.Tensor, torch.Tensor.requires_grad_, drawn((2, 4, 9, 10)))
    counts = []
    for backend in ("cpu", "reference"):
        with segops.use_backend(backend), FlopCounterMode(display=False) as counter:
            out = multi_scale_strip_conv(**tensors)
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(4, 5, 6)}, ValueError, r"x must be \[N, C, H, W\], got 3 axes"),
        ({"x": torch.zeros(1, 4, 0, 6)}, ValueError, "x must have C, H, W >= 1"),
        ({"weight": torch.zeros(4, 1, 4, 5)}, ValueError, r"weight must be \[4, 1, odd, odd\], got \(4, 1, 4, 5\)"),
        ({"weight": torch.zeros(3, 1, 5, 5)}, ValueError, r"weight must be \[4, 1, odd, odd\]"),
        ({"weight": torch.zeros(4, 1, 5, 5).double()}, TypeError, "weight must have x's dtype torch.float32"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[4\], got \(5,\)"),
        ({"strips": 3}, TypeError, "strips must be a sequence"),
        ({"strips": [(torch.zeros(4, 1, 1, 7), None)]}, TypeError, r"strips\[0\] must be \(w_1xk, bias or None"),
        ({"strips": [(torch.zeros(4, 1, 7, 1), None, torch.zeros(4, 1, 7, 1), None)]}, ValueError,
         r"strips\[0\]\[0\] must be \[4, 1, 1, odd\]"),
        ({"strips": [(torch.zeros(4, 1, 1, 7), None, torch.zeros(4, 1, 5, 1), None)]}, ValueError,
         r"strips\[0\]\[2\] must be \[4, 1, 7, 1\], got \(4, 1, 5, 1\)"),
        ({"strips": [(torch.zeros(4, 1, 1, 7), torch.zeros(2), torch.zeros(4, 1, 7, 1), None)]}, ValueError,
         r"strips\[0\]\[1\] must be \[4\]"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, error, message):
    good = {"x": torch.zeros(1, 4, 5, 6), "weight": torch.zeros(4, 1, 5, 5), "bias": None, "strips": []}
    with pytest.raises(error, match=f"multi_scale_strip_conv: {message}"):
        multi_scale_strip_conv(**{**good, **change})
