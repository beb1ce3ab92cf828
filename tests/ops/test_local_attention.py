"""local_attention's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import segops
from segops import local_attention
from segops.reference.local_attention import local_attention as reference

from .lanes import every_lane

torch.manual_seed(0)


def literal(query, key, value, kernel_size, dilation, num_heads, scale, border):
    """semantics.md 1.3 word by word: loops over pixels and taps, the shifted window by its clamp formula."""
    n, c, h, w = query.shape
    d, dv = c // num_heads, value.shape[1] // num_heads
    (kh, kw), (rh, rw) = kernel_size, dilation
    out = torch.zeros(n, num_heads * dv, h, w, dtype=query.dtype)
    lse = torch.zeros(n, num_heads, h, w, dtype=query.dtype)

    def taps(p, length, k, r):
        if border != "shift":
            return [p + r * (i - k // 2) for i in range(k)]
        phase, group = p % r, p // r
        length_of_phase = math.ceil((length - phase) / r)
        start = min(max(group - k // 2, 0), length_of_phase - k)
        return [phase + r * (start + t) for t in range(k)]

    for b, head, y, x in itertools.product(range(n), range(num_heads), range(h), range(w)):
        q = query[b, head * d : (head + 1) * d, y, x]
        logits, values = [], []
        for ty, tx in itertools.product(taps(y, h, kh, rh), taps(x, w, kw, rw)):
            inside = 0 <= ty < h and 0 <= tx < w
            if not inside and border == "mask":
                continue
            k = key[b, head * d : (head + 1) * d, ty, tx] if inside else torch.zeros_like(q)
            v = value[b, head * dv : (head + 1) * dv, ty, tx] if inside else torch.zeros(dv, dtype=query.dtype)
            logits.append(scale * (q @ k))
            values.append(v)
        logits = torch.stack(logits)
        lse[b, head, y, x] = logits.logsumexp(0)
        out[b, head * dv : (head + 1) * dv, y, x] = logits.softmax(0) @ torch.stack(values)
    return out, lse


@pytest.mark.parametrize("border", ["zero", "mask", "shift"])
@pytest.mark.parametrize("window", [((3, 5), (2, 1)), ((1, 3), (3, 2)), ((3, 3), (1, 3))], ids=str)
def test_reference_is_the_formula(border, window):
    query, key = torch.randn(2, 2, 4, 7, 9, dtype=torch.float64).unbind()
    value = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    arguments = (query, key, value, *window, 2, 0.7, border)
    for actual, expected in zip(reference(*arguments), literal(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_lane
@pytest.mark.parametrize("border", ["zero", "mask"])
def test_one_tap_returns_the_value(lane, border):
    query, key, value = torch.randn(3, 2, 6, 4, 5, device=lane.device).unbind()
    with lane.active():
        out, lse = local_attention(query, key, value, 1, 3, num_heads=2, scale=0.5, border=border, return_lse=True)
    torch.testing.assert_close(out, value)
    torch.testing.assert_close(lse, 0.5 * (query * key).unflatten(1, (2, 3)).sum(2))


@every_lane
def test_masked_attention_of_a_constant_is_the_constant(lane):
    query, key = torch.randn(2, 1, 4, 6, 7, device=lane.device).unbind()
    value = torch.full((1, 2, 6, 7), 1.75, device=lane.device)
    with lane.active():
        out = local_attention(query, key, value, 5, 2, num_heads=2, border="mask")
    torch.testing.assert_close(out, value)


@every_lane
def test_padding_dilutes_the_softmax(lane):
    """border="zero" is border="mask" times sigmoid(lse - log of the number of padded taps)."""
    query, key, value = torch.randn(3, 1, 4, 6, 8, dtype=torch.float64, device=lane.device).unbind()
    window = {"kernel_size": 3, "dilation": (3, 2), "num_heads": 2, "return_lse": True}
    with lane.active():
        masked, lse = local_attention(query, key, value, **window, border="mask")
        zero, _ = local_attention(query, key, value, **window, border="zero")
    ones = torch.ones(1, 1, 6, 8, dtype=torch.float64, device=lane.device)
    inside = torch.nn.functional.unfold(ones, 3, (3, 2), (3, 2)).sum(1).view(1, 1, 6, 8)
    share = torch.sigmoid(lse - torch.log(9 - inside)).repeat_interleave(2, 1)
    torch.testing.assert_close(zero, masked * share, rtol=1e-10, atol=1e-12)


@every_lane
@pytest.mark.parametrize("border", ["zero", "mask", "shift"])
def test_mirrored_input_gives_mirrored_output(lane, border):
    tensors = torch.randn(3, 1, 4, 8, 9, dtype=torch.float64, device=lane.device).unbind()
    window = {"kernel_size": (3, 5), "dilation": (2, 1), "border": border}
    if border == "shift":  # the phases of a dilated window start at the near edge: only dilation 1 is symmetric
        window["dilation"] = 1
    with lane.active():
        out = local_attention(*tensors, **window)
        mirrored = local_attention(*(x.flip(2, 3) for x in tensors), **window)
    torch.testing.assert_close(mirrored.flip(2, 3), out, rtol=1e-12, atol=1e-12)


@every_lane
def test_a_head_is_a_call_of_its_own(lane):
    query, key, value = torch.randn(3, 1, 6, 5, 7, device=lane.device).unbind()
    with lane.active():
        together = local_attention(query, key, value, 3, 2, num_heads=3)
        apart = [
            local_attention(*(x.contiguous() for x in head), 3, 2)
            for head in zip(query.chunk(3, 1), key.chunk(3, 1), value.chunk(3, 1), strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(apart, 1))


@every_lane
def test_only_lse_is_wanted(lane):
    tensors = [x.requires_grad_() for x in torch.randn(3, 1, 2, 4, 5, dtype=torch.float64, device=lane.device).unbind()]
    with lane.active():
        _, lse = local_attention(*tensors, 3, return_lse=True)
        query, key, value = torch.autograd.grad(lse.sum(), tensors, materialize_grads=True)
    expected = reference(*tensors, (3, 3), (1, 1), 1, 2**-0.5, "zero")[1]
    for actual, wanted in zip((query, key), torch.autograd.grad(expected.sum(), tensors[:2]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    assert not value.any()


@every_lane
def test_large_logits_do_not_overflow(lane):
    query, key, value = (30 * torch.randn(3, 1, 4, 5, 6, device=lane.device)).unbind()
    with lane.active():
        out, lse = local_attention(query, key, value, 3, 2, scale=1.0, return_lse=True)
    expected = reference(query.double(), key.double(), value.double(), (3, 3), (2, 2), 1, 1.0, "zero")
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-3)


@every_lane
def test_nan_spreads_to_its_neighbours_only(lane):
    query, key, value = torch.randn(3, 1, 2, 7, 9, device=lane.device).unbind()
    value = value.clone()
    value[0, 0, 3, 4] = torch.nan
    with lane.active():
        out = local_attention(query, key, value, 3, 2, border="mask")
    hit = torch.zeros(7, 9, dtype=torch.bool)
    hit[1:6:2, 2:7:2] = True
    assert torch.equal(out[0, 0].isnan().cpu(), hit)
    assert out[0, 1].isfinite().all()


@every_lane
def test_storage_offsets_beyond_2_31(lane):
    """Channels 2^30 elements apart in one untouched allocation: only the pages that are read exist."""
    torch.use_deterministic_algorithms(False)  # or the whole allocation would be filled with NaN
    if lane.device == "cuda" and torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("less than 8 GiB of GPU memory are free")
    storage = torch.empty(2**31 + 2**12, dtype=torch.bfloat16, device=lane.device)
    far = storage.as_strided((1, 3, 5, 6), (0, 2**30, 8, 1))
    near = torch.randn(1, 3, 5, 6, device=lane.device).bfloat16()
    far.copy_(near)
    with lane.active():
        query, key, value = (x.requires_grad_() for x in (far.detach(), far.detach(), far.detach()))
        out = local_attention(query, key, value, 3, 2)
        gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
        close = [near.clone().requires_grad_() for _ in range(3)]
        expected = local_attention(*close, 3, 2)
        wanted = torch.autograd.grad(expected.float().square().sum(), close)
    for a, b in zip((out, *gradients), (expected, *wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    query = torch.randn(1, 1, 512, 1024, device=device).bfloat16().expand(1, 4100, 512, 1024)
    assert query.numel() > 2**31
    value = torch.randn(1, 1, 512, 1024, device=device).bfloat16()
    with segops.use_backend(backend), torch.no_grad():
        out = local_attention(query, query, value, (1, 3), 2, scale=1 / 4100)
    one = query[:, :1].double()
    expected, _ = reference(one, one, value.double(), (1, 3), (2, 2), 1, 1.0, "zero")
    torch.testing.assert_close(out.double(), expected, rtol=1.6e-2, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 40),
    st.sampled_from([1, 3, 5, 7, 9]), st.sampled_from([1, 3, 5, 7, 13]), st.integers(1, 4), st.integers(1, 7),
    st.sampled_from(["zero", "mask", "shift"]),
)  # fmt: skip
def test_any_shape_on_cpu(n, heads, d, dv, h, w, kh, kw, rh, rw, border):
    if border == "shift":
        h, w = max(h, kh * rh), max(w, kw * rw)
    generator = torch.Generator().manual_seed(n * 1000 + h * 50 + w)

    def draw(channels):
        return torch.randn(n, heads * channels, h, w, dtype=torch.float64, generator=generator, requires_grad=True)

    tensors = [draw(d), draw(d), draw(dv)]
    with segops.use_backend("cpu"):
        actual = local_attention(
            *tensors, (kh, kw), (rh, rw), num_heads=heads, scale=0.6, border=border, return_lse=True
        )
    expected = reference(*tensors, (kh, kw), (rh, rw), heads, 0.6, border)
    weights = [torch.randn(out.shape, dtype=torch.float64, generator=generator) for out in expected]
    for a, b in zip(
        (*actual, *torch.autograd.grad(actual, tensors, weights)),
        (*expected, *torch.autograd.grad(expected, tensors, weights)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_output_follows_the_querys_layout():
    query, key, value = (x.to(memory_format=torch.channels_last) for x in torch.randn(3, 2, 8, 5, 6).unbind())
    assert local_attention(query, key, value, 3).is_contiguous(memory_format=torch.channels_last)
    assert local_attention(query.contiguous(), key, value, 3).is_contiguous()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": 3}, TypeError, "query must be a tensor"),
        ({"query": torch.zeros(4, 5, 6)}, ValueError, r"query must be \[N, C, H, W\], got 3 axes"),
        ({"query": torch.zeros(1, 4, 5, 6, dtype=torch.int64)}, TypeError, "floating-point dtype, got torch.int64"),
        ({"key": torch.zeros(1, 4, 5, 6, dtype=torch.float64)}, TypeError, "key must have query's dtype torch.float32"),
        ({"key": torch.zeros(1, 4, 5, 7)}, ValueError, r"key must have query's shape \(1, 4, 5, 6\)"),
        ({"key": torch.zeros(1, 4, 5, 6, device="meta")}, ValueError, "key must be on query's device cpu"),
        ({"value": torch.zeros(1, 4, 6, 6)}, ValueError, r"value must be \[1, C, 5, 6\]"),
        ({"value": torch.zeros(1, 3, 5, 6), "num_heads": 2}, ValueError, "value must have a multiple of num_heads=2"),
        ({"num_heads": 3}, ValueError, "query must have a multiple of num_heads=3 channels, got 4"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"num_heads": 1.0}, TypeError, "num_heads must be an int"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd and at least 1, got 4"),
        ({"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an int or a pair"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int or a pair"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"border": "circular"}, ValueError, "border must be one of 'zero', 'mask', 'shift', got 'circular'"),
        ({"border": "shift", "dilation": 2}, ValueError, r"kernel_size \* dilation <= H, got 3 \* 2 > 5"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {name: torch.zeros(1, 4, 5, 6) for name in ("query", "key", "value")} | {"kernel_size": 3}
    with pytest.raises(error, match=f"local_attention: .*{message}|local_attention: {message}"):
        local_attention(**{**good, **change})


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_flops_are_those_of_two_products_with_the_taps(backward):
    q, k, v = (torch.randn(2, c, 5, 7, requires_grad=True) for c in (6, 6, 4))

    def unfolded():
        scores = torch.einsum("ncp,nctp->npt", q.flatten(2), F.unfold(k, 3, 2, 2).view(2, 6, 9, 35))
        return torch.einsum("npt,nctp->ncp", scores.softmax(2), F.unfold(v, 3, 2, 2).view(2, 4, 9, 35))

    counts = []
    for function in (lambda: segops.local_attention(q, k, v, 3, 2), unfolded):
        with segops.use_backend("cpu"), FlopCounterMode(display=False) as counter:
            out = function()
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
