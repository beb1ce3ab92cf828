"""axial_attention's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import segops
from segops import _dispatch, axial_attention
from segops.reference.axial_attention import axial_attention as reference

from .lanes import LANES, every_lane

torch.manual_seed(0)

MODES = [
    {"combine": "compose"},
    {"combine": "compose", "order": ("width", "height")},
    {"combine": "sum"},
    {"combine": "joint"},
    {"order": ("height",)},
    {"order": ("width",)},
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join([m.get("combine", ""), *m.get("order", ())]))


def literal(query, key, value, num_heads, scale, combine, order):
    """semantics.md 4 and CCNet word by word: loops over pixels."""
    n, c, h, w = query.shape
    d, dv = c // num_heads, value.shape[1] // num_heads

    def attend(values, seen):
        out = torch.zeros(n, num_heads * dv, h, w, dtype=query.dtype)
        for b, m, y, x in itertools.product(range(n), range(num_heads), range(h), range(w)):
            at = torch.tensor(seen(y, x))
            q = query[b, m * d : (m + 1) * d, y, x]
            k = key[b, m * d : (m + 1) * d, at[:, 0], at[:, 1]]
            v = values[b, m * dv : (m + 1) * dv, at[:, 0], at[:, 1]]
            out[b, m * dv : (m + 1) * dv, y, x] = v @ torch.softmax(scale * (q @ k), 0)
        return out

    lines = {"height": lambda y, x: [(j, x) for j in range(h)], "width": lambda y, x: [(y, j) for j in range(w)]}
    if combine == "joint":
        return attend(value, lambda y, x: [at for at in lines["height"](y, x) if at[0] != y] + lines["width"](y, x))
    if combine == "sum":
        return sum(attend(value, lines[axis]) for axis in order)
    for axis in order:
        value = attend(value, lines[axis])
    return value


@every_mode
def test_reference_is_the_formula(mode):
    query, key = torch.randn(2, 2, 4, 4, 5, dtype=torch.float64).unbind()
    value = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    mode = {"combine": "compose", "order": ("height", "width")} | mode
    with segops.use_backend("reference"):
        actual = axial_attention(query, key, value, num_heads=2, scale=0.7, **mode)
    torch.testing.assert_close(actual, literal(query, key, value, 2, 0.7, **mode), rtol=1e-12, atol=1e-12)


def per_axis(query, key, value, num_heads, axes):
    """What a user would write: scaled_dot_product_attention on permuted copies, one axis after the other."""
    there, back = {"h": ((0, 4, 1, 3, 2), (0, 2, 4, 3, 1)), "w": ((0, 3, 1, 4, 2), (0, 2, 4, 1, 3))}, None
    for axis in axes:
        to, back = there[axis]
        heads = (x.unflatten(1, (num_heads, -1)).permute(to) for x in (query, key, value))
        value = F.scaled_dot_product_attention(*heads).permute(back).flatten(1, 2)
    return value


@every_lane
@pytest.mark.parametrize("order", [("height", "width"), ("width", "height")], ids="-".join)
def test_composed_is_attention_per_axis(lane, order):
    query, key, value = torch.randn(3, 1, 4, 3, 4, device=lane.device).unbind()
    with lane.active():
        actual = axial_attention(query, key, value, num_heads=2, order=order)
    expected = per_axis(query, key, value, 2, "".join(axis[0] for axis in order))
    torch.testing.assert_close(actual, expected)


@every_lane
def test_one_row_is_self_attention(lane):
    query, key = torch.randn(2, 1, 5, 1, 40, device=lane.device).unbind()
    value = torch.randn(1, 7, 1, 40, device=lane.device)
    with lane.active():
        actual = axial_attention(query, key, value, scale=1.0, order=("width",))
    rows = [x.flatten(2).mT for x in (query, key, value)]
    torch.testing.assert_close(actual.flatten(2).mT, F.scaled_dot_product_attention(*rows, scale=1.0))


@every_lane
def test_turning_the_map_turns_the_order(lane):
    query, key, value = torch.randn(3, 1, 3, 2, 4, device=lane.device).unbind()
    with lane.active():
        out = axial_attention(query, key, value)
        turned = axial_attention(query.mT, key.mT, value.mT, order=("width", "height"))
        joint = axial_attention(query, key, value, combine="joint")
        joint_turned = axial_attention(query.mT, key.mT, value.mT, combine="joint")
    torch.testing.assert_close(turned.mT, out)
    torch.testing.assert_close(joint_turned.mT, joint)


@every_lane
def test_sum_is_the_sum_of_the_axes(lane):
    query, key, value = torch.randn(3, 1, 2, 3, 4, device=lane.device).unbind()
    with lane.active():
        both = axial_attention(query, key, value, combine="sum")
        apart = [axial_attention(query, key, value, order=(axis,)) for axis in ("height", "width")]
    torch.testing.assert_close(both, apart[0] + apart[1])


@every_lane
@pytest.mark.parametrize("combine", ["compose", "joint"])
def test_constant_values_stay(lane, combine):
    query, key = torch.randn(2, 1, 4, 3, 5, device=lane.device).unbind()
    value = torch.full((1, 2, 3, 5), 1.75, device=lane.device)
    with lane.active():
        out = axial_attention(query, key, value, num_heads=2, combine=combine)
    torch.testing.assert_close(out, value)


@every_lane
def test_joint_counts_the_pixel_once(lane):
    """Keys of zero: the mean over column and row, in which the pixel has one part of H + W - 1."""
    query = torch.randn(1, 3, 3, 4, device=lane.device)
    value = torch.zeros(1, 1, 3, 4, device=lane.device)
    value[0, 0, 1, 2] = 1
    with lane.active():
        out = axial_attention(query, torch.zeros_like(query), value, combine="joint")
    expected = torch.zeros(3, 4)
    expected[1, :] = expected[:, 2] = 1 / 6
    torch.testing.assert_close(out[0, 0].cpu(), expected)


@every_lane
@pytest.mark.parametrize("combine", ["compose", "joint"])
def test_large_logits_do_not_overflow(lane, combine):
    query, key, value = (30 * torch.randn(3, 1, 4, 3, 4, device=lane.device)).unbind()
    with lane.active():
        out = axial_attention(query, key, value, scale=1.0, combine=combine)
    expected = reference(query.double(), key.double(), value.double(), 1, 1.0, combine, "hw")[0]
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@every_lane
def test_nan_spreads_along_its_lines_only(lane):
    query, key, value = torch.randn(3, 1, 2, 4, 5, device=lane.device).unbind()
    value = value.clone()
    value[0, 0, 1, 2] = torch.nan
    with lane.active():
        out = axial_attention(query, key, value, combine="joint")
    hit = torch.zeros(4, 5, dtype=torch.bool)
    hit[1, :] = hit[:, 2] = True
    assert torch.equal(out[0, 0].isnan().cpu(), hit)
    assert out[0, 1].isfinite().all()


@every_mode
def test_without_gradients_the_same_values(mode):
    """Composed, the result of the first axis is then kept nowhere."""
    tensors = torch.randn(3, 2, 6, 21, 34).unbind()
    plain = axial_attention(*tensors, num_heads=2, **mode)
    assert torch.equal(plain, axial_attention(tensors[0].clone().requires_grad_(), *tensors[1:], num_heads=2, **mode))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    query = torch.randn(1, 4096, 4, 1, device=device).bfloat16().expand(1, 4096, 4, 2**17 + 8)
    assert query.numel() > 2**31
    value = torch.randn(1, 2, 4, 2**17 + 8, device=device).bfloat16()
    with segops.use_backend(backend), torch.no_grad():
        out = axial_attention(query, query, value, scale=1 / 64, order=("height",))
    one, some = query[..., :1].double(), value.double()
    attention = torch.einsum("ncyx,ncjx->yj", one, one).div(64).softmax(1)
    torch.testing.assert_close(out.double(), torch.einsum("yj,ncjx->ncyx", attention, some), rtol=1.6e-2, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 40),
    st.integers(1, 40), st.sampled_from(MODES), st.sampled_from(["nchw", "channels_last", "turned"]),
)  # fmt: skip
def test_any_shape_on_cpu(n, heads, d, dv, h, w, mode, layout):
    generator = torch.Generator().manual_seed(n * 1000 + h * 50 + w)

    def draw(channels):
        x = torch.randn(n, heads * channels, h, w, dtype=torch.float64, generator=generator)
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        return (x.mT.contiguous().mT if layout == "turned" else x).requires_grad_()

    tensors = [draw(d), draw(d), draw(dv)]
    weight = torch.randn(n, heads * dv, h, w, dtype=torch.float64, generator=generator)
    results = []
    for backend in ("cpu", "reference"):
        with segops.use_backend(backend):
            out = axial_attention(*tensors, num_heads=heads, scale=0.6, **mode)
            results.append((out, *torch.autograd.grad(out, tensors, weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


LAYOUTS = {"nchw": (torch.contiguous_format,) * 3, "channels_last": (torch.channels_last,) * 3}
LAYOUTS["query last"] = (torch.channels_last, torch.contiguous_format, torch.contiguous_format)
LAYOUTS["value last"] = (torch.contiguous_format, torch.channels_last, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_mode
def test_heads_and_lines_together(mode, layout):
    """Heads, or lines, are packed together where they lie together, and left in place where they may be."""
    widths = (32, 32, 64)
    tensors = [
        torch.randn(1, width, 20, 300, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        for width, memory_format in zip(widths, LAYOUTS[layout], strict=True)
    ]
    weight = torch.randn_like(tensors[2])
    results = []
    for backend in ("cpu", "reference"):
        with segops.use_backend(backend):
            out = axial_attention(*tensors, num_heads=4, scale=0.4, **mode)
            with torch.no_grad():
                again = axial_attention(*tensors, num_heads=4, scale=0.4, **mode)
            results.append((out, again, *torch.autograd.grad(out, tensors, weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_lane
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_of_whole_vectors(lane, layout, dtype):
    """Widths at which channels are read as vectors, in place or widened; lines one pixel longer than whole tiles."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, width, 5, 33, generator=generator).to(dtype).to(lane.device, memory_format=f)
        for width, f in zip((64, 64, 128), LAYOUTS[layout], strict=True)
    ]
    leaves = [x.requires_grad_() for x in inputs]
    weight = torch.randn(inputs[2].shape, generator=generator).to(lane.device)
    with lane.active():
        out = axial_attention(*leaves, num_heads=2, order=("width",))
        found = [out, *torch.autograd.grad(out, leaves, weight.to(dtype))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with segops.use_backend("reference"):
        out = axial_attention(*exact, num_heads=2, order=("width",))
        expected = [out, *torch.autograd.grad(out, exact, weight.to(dtype).double())]
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane.backend == "cpu"], ids=lambda lane: lane.name)
@pytest.mark.parametrize("shape", [(1, 2, 3, 700), (1, 2, 700, 3), (1, 2, 1, 2100)], ids=str)
@pytest.mark.parametrize("d_v", [3, 150, 160])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_lines_in_pieces(lane, shape, d_v, layout):
    """Long lines are cut into pieces, wide values into chunks, keys into parts; composed, none may replace what others
    read."""
    lane.skip_if_missing("axial_attention")
    tensors = [torch.randn(shape[0], c, *shape[2:], dtype=torch.float64) for c in (shape[1], shape[1], d_v)]
    leaves = [x.to(memory_format=f).requires_grad_() for x, f in zip(tensors, LAYOUTS[layout], strict=True)]
    weight = torch.randn_like(tensors[2])
    results = []
    for active in (lane.active(), segops.use_backend("reference")):
        with active:
            out = axial_attention(*leaves)
            with torch.no_grad():
                results.append((out, axial_attention(*leaves), *torch.autograd.grad(out, leaves, weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_output_follows_the_querys_layout():
    query, key, value = (x.to(memory_format=torch.channels_last) for x in torch.randn(3, 2, 8, 5, 6).unbind())
    assert axial_attention(query, key, value).is_contiguous(memory_format=torch.channels_last)
    assert axial_attention(query.contiguous(), key, value).is_contiguous()


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
        ({"combine": "mean"}, ValueError, "combine must be one of 'compose', 'sum', 'joint', got 'mean'"),
        ({"order": "height"}, TypeError, "order must be a tuple of 'height' and 'width', got 'height'"),
        ({"order": ("height", "depth")}, ValueError, "order must be one of 'height', 'width', got 'depth'"),
        ({"order": ("width", "width")}, ValueError, "order must hold 'height', 'width' or both, each once"),
        ({"order": ()}, ValueError, "order must hold 'height', 'width' or both, each once"),
        ({"order": ("width",), "combine": "joint"}, ValueError, "combine='joint' is over both axes"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {name: torch.zeros(1, 4, 5, 6) for name in ("query", "key", "value")}
    with pytest.raises(error, match=f"axial_attention: .*{message}|axial_attention: {message}"):
        axial_attention(**{**good, **change})


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_flops_are_those_of_attention_per_axis(backward):
    q, k, v = (torch.randn(2, c, 5, 7, requires_grad=True) for c in (6, 6, 4))

    def permuted():
        out = v
        for axis in ("h", "w"):
            rows = [(x.mT if axis == "h" else x).permute(0, 2, 3, 1).flatten(0, 1) for x in (q, k, out)]
            mixed = torch.bmm(torch.bmm(rows[0], rows[1].mT).softmax(2), rows[2])
            out = mixed.unflatten(0, (2, -1)).permute(0, 3, 1, 2)
            out = out.mT if axis == "h" else out
        return out

    counts = []
    for function in (lambda: axial_attention(q, k, v), permuted):
        with segops.use_backend("cpu"), FlopCounterMode(display=False) as counter:
            out = function()
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [(torch.nan, ValueError, "scale must be finite, got nan"), ("a", TypeError, "scale must be a number, got 'a'"),
     (torch.ones(()), TypeError, r"scale must be a number, got tensor\(1.\)")],
)  # fmt: skip
def test_scale_is_a_finite_number(scale, error, words):
    with pytest.raises(error, match=f"axial_attention: {words}"):
        axial_attention(*torch.randn(3, 1, 2, 3, 4).unbind(), scale=scale)


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane.backend == "triton"], ids=lambda lane: lane.name)
@pytest.mark.parametrize(("heads", "images"), [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("order", [("height", "width"), ("width", "height")], ids=str)
def test_composed_in_pieces_is_the_whole(lane, heads, images, order, monkeypatch):
    """Without a gradient the first axis's result is of a few images, heads and channels at a time."""
    lane.skip_if_missing("axial_attention")
    kernels = _dispatch.kernels("axial_attention")
    monkeypatch.setattr(kernels, "LITTLE", 0)
    q, k = (torch.randn(images, heads * 5, 4, 6, device=lane.device) for _ in range(2))
    v = torch.randn(images, heads * 130, 4, 6, device=lane.device)
    with lane.active(), torch.no_grad():
        actual = axial_attention(q, k, v, num_heads=heads, order=order)
    with segops.use_backend("reference"):
        torch.testing.assert_close(actual, axial_attention(q, k, v, num_heads=heads, order=order))
    lse = v.new_empty(images, heads, 2, 4, 6)
    pieces = list(kernels._pieces(v, v.new_empty(0), lse, q, k, v, heads))
    assert len(pieces) > 1
    least = 64 * 4 * 6
    assert max(between.numel() for _, between in pieces) <= max(least, (q.numel() + k.numel() + 2 * v.numel()) // 10)
