"""dupsample's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import segops
from segops import dupsample

from .lanes import every_lane

torch.manual_seed(0)


def head(n, channels, h, w, classes, r, device="cpu", dtype=torch.float64):
    x = torch.randn(n, channels, h, w, device=device, dtype=dtype)
    weight = torch.randn(r * r * classes, channels, device=device, dtype=dtype)
    return x, weight, torch.randn(r * r * classes, device=device, dtype=dtype)


def shuffled(x, weight, bias, r, temperature=1.0):
    """The same by torch's own layers, whose channel order is k r r + dy r + dx."""
    classes = weight.shape[0] // r**2
    weight = weight.view(r, r, classes, -1).permute(2, 0, 1, 3).reshape(weight.shape)
    bias = bias.view(r, r, classes).permute(2, 0, 1).reshape(-1)
    return F.pixel_shuffle(F.conv2d(x, weight[:, :, None, None], bias), r) / temperature


def test_reference_is_the_formula():
    """semantics.md 6.2 word by word: loops over cells, pixels of the window, classes."""
    (n, channels, h, w), classes, r = (2, 4, 2, 3), 5, 3
    x, weight, bias = head(n, channels, h, w, classes, r)
    with segops.use_backend("reference"):
        out = dupsample(x, weight, bias, scale_factor=r, temperature=0.7)
    for i, j, dy, dx, k in itertools.product(range(h), range(w), range(r), range(r), range(classes)):
        row = (dy * r + dx) * classes + k
        expected = (x[:, :, i, j] @ weight[row] + bias[row]) / 0.7
        torch.testing.assert_close(out[:, k, r * i + dy, r * j + dx], expected)


@every_lane
@pytest.mark.parametrize(("classes", "r"), [(2, 1), (7, 4), (2, 32), (1000, 1), (1000, 2), (1, 5)])
def test_is_a_pixel_shuffle_of_reordered_weights(lane, classes, r):
    x, weight, bias = head(1, 3, 2, 3, classes, r, lane.device)
    with lane.active():
        out = dupsample(x, weight, bias, scale_factor=r)
    torch.testing.assert_close(out, shuffled(x, weight, bias, r))


@every_lane
def test_crops_at_the_bottom_and_on_the_right(lane):
    x, weight, bias = (x.requires_grad_() for x in head(2, 3, 3, 2, 4, 5, lane.device))
    grad = torch.randn(2, 4, 11, 6, device=lane.device, dtype=torch.float64)
    with lane.active():
        out = dupsample(x, weight, bias, scale_factor=5, size=(11, 6))
        actual = torch.autograd.grad(out, (x, weight, bias), grad)
    expected = shuffled(x, weight, bias, 5)[:, :, :11, :6]
    torch.testing.assert_close(out, expected)
    for a, b in zip(actual, torch.autograd.grad(expected, (x, weight, bias), grad), strict=True):
        torch.testing.assert_close(a, b)


@every_lane
@pytest.mark.parametrize("value", [0.3, -2.0])
def test_temperature_divides_and_has_a_gradient(lane, value):
    x, weight, bias = head(1, 3, 2, 2, 3, 2, lane.device)
    temperature = torch.tensor([value], device=lane.device, dtype=torch.float64, requires_grad=True)
    with lane.active():
        out = dupsample(x, weight, bias, scale_factor=2, temperature=temperature)
        number = dupsample(x, weight, bias, scale_factor=2, temperature=value)
        (gradient,) = torch.autograd.grad(out.square().sum(), temperature)
    expected = shuffled(x, weight, bias, 2, value)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(number, expected)
    torch.testing.assert_close(gradient, (-2 * expected.square().sum() / value).view(1))


@every_lane
def test_output_follows_the_inputs_layout(lane):
    x, weight, _ = head(2, 4, 3, 5, 3, 2, lane.device, torch.float32)
    with lane.active():
        assert dupsample(x, weight, scale_factor=2).is_contiguous()
        out = dupsample(x.to(memory_format=torch.channels_last), weight, scale_factor=2)
    if lane.backend != "reference":
        assert out.is_contiguous(memory_format=torch.channels_last)


@every_lane
def test_a_convolutions_weight_is_taken(lane):
    x, weight, bias = head(1, 3, 2, 2, 2, 2, lane.device)
    with lane.active():
        flat = dupsample(x, weight, bias, scale_factor=2)
        assert torch.equal(flat, dupsample(x, weight[:, :, None, None], bias, scale_factor=2))


@every_lane
def test_a_half_precision_temperature_is_not_lowered(lane):
    x, weight, bias = head(1, 3, 2, 2, 2, 2, lane.device, torch.float32)
    temperature = torch.tensor(1.5, dtype=torch.bfloat16, device=lane.device, requires_grad=True)
    with lane.active():
        out = dupsample(x, weight, bias, scale_factor=2, temperature=temperature)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert temperature.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, shuffled(x, weight, bias, 2, 1.5))


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    line = torch.randn(1, 1, 1024, 2050, device=device).bfloat16()
    x = line.expand(1, 1024, 1024, 2050)
    assert x.numel() > 2**31
    weight = (torch.randn(2, 1024, device=device) / 32).bfloat16()
    with segops.use_backend(backend), torch.no_grad():
        out = dupsample(x, weight, scale_factor=1)
    expected = line.double() * weight.double().sum(1)[:, None, None]
    torch.testing.assert_close(out.double(), expected, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 3}, TypeError, r"x must be a tensor \[N, C, h, w\], got int"),
        ({"x": torch.zeros(4, 5, 6)}, ValueError, r"x must be \[N, C, h, w\], got 3 axes"),
        ({"x": torch.zeros(1, 4, 0, 6)}, ValueError, r"x must have C, h, w >= 1, got \(1, 4, 0, 6\)"),
        ({"x": torch.zeros(1, 4, 5, 6, dtype=torch.int64)}, TypeError, "floating-point dtype, got torch.int64"),
        ({"weight": torch.zeros(12, 4).double()}, TypeError, "weight must have x's dtype torch.float32"),
        ({"weight": torch.zeros(12, 4, device="meta")}, ValueError, "weight must be on x's device cpu, got meta"),
        ({"weight": torch.zeros(12, 3)}, ValueError, "weight must have x's 4 channels on its second axis, got 3"),
        ({"weight": torch.zeros(13, 4)}, ValueError, r"a multiple of scale_factor \*\* 2 = 4 rows, got 13"),
        ({"scale_factor": 3}, ValueError, r"a multiple of scale_factor \*\* 2 = 9 rows, got 12"),
        ({"weight": torch.zeros(12)}, ValueError, r"weight must be \[r \* r \* K, C\], got 1 axes"),
        ({"weight": torch.zeros(12, 4, 3, 3)}, ValueError, r"weight must be \[r \* r \* K, C\], got 4 axes"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[12\] as weight has rows, got \[3\]"),
        ({"scale_factor": 2.0}, TypeError, "scale_factor must be an int, got 2.0"),
        ({"scale_factor": 0}, ValueError, "scale_factor must be at least 1, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and not 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite and not 0, got nan"),
        ({"temperature": torch.zeros(2)}, ValueError, r"one floating-point element, \[\] or \[1\], got .* \[2\]"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number or a tensor, got str"),
        ({"size": (8, 12)}, ValueError, r"size must have H in \[9, 10\] for 5 cells and scale_factor=2, got 8"),
        ({"size": (10, 13)}, ValueError, r"size must have W in \[11, 12\] for 6 cells and scale_factor=2, got 13"),
        ({"size": 9.5}, TypeError, "size must be an int or a pair"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"x": torch.zeros(1, 4, 5, 6), "weight": torch.zeros(12, 4), "bias": torch.zeros(12), "scale_factor": 2}
    with pytest.raises(error, match=f"dupsample: .*{message}|dupsample: {message}"):
        dupsample(**{**good, **change})


@every_lane
@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("name", ["dupsample", "dupsample_cross_entropy", "dupsample_argmax"])
def test_a_temperature_of_0_or_nan_in_a_tensor(lane, name, value):
    if lane.device == "cuda":
        pytest.skip("on a GPU the value is not read")
    x, weight, bias = head(1, 3, 2, 2, 2, 2)
    target = {"target": torch.zeros(1, 4, 4, dtype=torch.uint8)} if name == "dupsample_cross_entropy" else {}
    temperature = torch.tensor([value], dtype=torch.float64)
    with lane.active(), pytest.raises(ValueError, match=f"{name}: temperature must be neither 0 nor NaN, got"):
        getattr(segops, name)(x, weight, bias=bias, scale_factor=2, temperature=temperature, **target)
