"""dupsample_cross_entropy's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import segops
from segops import dupsample_cross_entropy

from .lanes import every_lane
from .test_dupsample import head, shuffled

torch.manual_seed(0)


def labels(shape, classes, ignore_index=255, dtype=torch.int64, device="cpu"):
    target = torch.randint(classes, shape).masked_fill(torch.rand(shape) < 0.2, ignore_index)
    return target.to(device, dtype)


@every_lane
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_is_torchs_cross_entropy(lane, reduction, weighted, smoothing):
    """Weights, smoothing, the ignored label and torch's weighted mean; a negative temperature; cropped."""
    tensors = [x.requires_grad_() for x in head(2, 5, 3, 2, 7, 3, lane.device)]
    temperature = torch.tensor(-0.8, device=lane.device, dtype=torch.float64, requires_grad=True)
    target = labels((2, 8, 5), 7, device=lane.device)
    weight = torch.rand(7, device=lane.device, dtype=torch.float64) + 0.5 if weighted else None
    settings = {"reduction": reduction, "label_smoothing": smoothing}
    with lane.active():
        actual = dupsample_cross_entropy(
            *tensors[:2], target, bias=tensors[2], scale_factor=3, temperature=temperature, class_weight=weight,
            **settings,
        )  # fmt: skip
    expected = F.cross_entropy(
        shuffled(*tensors, 3, temperature)[:, :, :8, :5], target, weight, ignore_index=255, **settings
    )
    torch.testing.assert_close(actual, expected)
    inputs, upstream = [*tensors, temperature], torch.randn(actual.shape, device=lane.device, dtype=torch.float64)
    with lane.active():
        gradients = torch.autograd.grad(actual, inputs, upstream)
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b)


@every_lane
@pytest.mark.parametrize(("classes", "r"), [(2, 1), (2, 32), (1000, 1), (1000, 2)])
def test_fewest_and_most_classes_and_scales(lane, classes, r):
    x, weight, bias = (x.float().requires_grad_() for x in head(1, 4, 1, 1, classes, r, lane.device))
    target = labels((1, r, r), classes, -1, device=lane.device)
    target[0, 0, 0] = 1
    inputs = () if lane.slow and r == 32 else (x, weight, bias)  # interpreted, the gradients take 40 seconds
    with lane.active():
        actual = dupsample_cross_entropy(x, weight, target, bias=bias, scale_factor=r, ignore_index=-1)
        gradients = torch.autograd.grad(actual, inputs) if inputs else ()
    expected = F.cross_entropy(shuffled(x.double(), weight.double(), bias.double(), r), target, ignore_index=-1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs) if inputs else (), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@every_lane
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_every_dtype(lane, dtype):
    x, weight, _ = head(1, 3, 2, 3, 4, 2, lane.device)
    target = labels((1, 4, 6), 4, device=lane.device)
    with lane.active():
        expected = dupsample_cross_entropy(x, weight, target, scale_factor=2)
        assert torch.equal(dupsample_cross_entropy(x, weight, target.to(dtype), scale_factor=2), expected)


@every_lane
@pytest.mark.parametrize("ignore_index", [-100, 2, 156, 70_000])
def test_the_ignored_label_is_compared_as_a_number(lane, ignore_index):
    """156 is -100 in uint8, and 70,000 is 4,464 in int16."""
    x, weight, _ = head(1, 3, 2, 3, 4, 2, lane.device)
    target = torch.randint(4, (1, 4, 6), device=lane.device, dtype=torch.uint8)
    with lane.active():
        actual = dupsample_cross_entropy(x, weight, target, scale_factor=2, ignore_index=ignore_index)
    logits = shuffled(x, weight, torch.zeros_like(weight[:, 0]), 2)
    torch.testing.assert_close(actual, F.cross_entropy(logits, target.long(), ignore_index=ignore_index))


@every_lane
def test_denominator_all_counts_every_pixel(lane):
    x, weight, _ = head(2, 3, 2, 3, 4, 2, lane.device)
    target = labels((2, 4, 6), 4, device=lane.device)
    with lane.active():
        mean = dupsample_cross_entropy(x, weight, target, scale_factor=2, denominator="all")
        total = dupsample_cross_entropy(x, weight, target, scale_factor=2, reduction="sum", denominator="all")
    torch.testing.assert_close(mean * target.numel(), total)


@every_lane
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_no_counted_pixel_gives_0_and_no_gradient(lane, reduction, denominator):
    tensors = [x.float().requires_grad_() for x in head(1, 3, 2, 2, 3, 2, lane.device)]
    temperature = torch.ones(1, device=lane.device, requires_grad=True)
    target = torch.full((1, 4, 4), 255, dtype=torch.uint8, device=lane.device)
    class_weight = torch.ones(3, device=lane.device)
    with lane.active():
        loss = dupsample_cross_entropy(
            *tensors[:2], target, bias=tensors[2], scale_factor=2, temperature=temperature, class_weight=class_weight,
            label_smoothing=0.1, reduction=reduction, denominator=denominator,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss.sum(), [*tensors, temperature])
    for value in (loss, *gradients):
        assert torch.equal(value, torch.zeros_like(value))


@every_lane
def test_a_label_out_of_range(lane):
    x, weight, _ = head(2, 3, 2, 3, 4, 2, lane.device)
    target = labels((2, 4, 6), 4, device=lane.device)
    target[1, 2, 3], target[1, 3, 0] = 4, -7
    expected = target.masked_fill((target < 0) | (target >= 4), 255)
    with lane.active():
        with pytest.raises(
            ValueError,
            match=r"dupsample_cross_entropy: target must be in \[0, 4\) or ignore_index=255, got 4 at \[1, 2, 3\]",
        ):
            dupsample_cross_entropy(x, weight, target, scale_factor=2, check_labels=True)
        unchecked = dupsample_cross_entropy(x, weight, target, scale_factor=2, check_labels=False)
        assert torch.equal(unchecked, dupsample_cross_entropy(x, weight, expected, scale_factor=2))


@every_lane
def test_large_logits_do_not_overflow(lane):
    x, weight, bias = (x.float() for x in head(1, 3, 2, 2, 5, 2, lane.device))
    target = labels((1, 4, 4), 5, device=lane.device)
    with lane.active():
        actual = dupsample_cross_entropy(x, weight, target, bias=bias, scale_factor=2, temperature=1e-3)
    expected = F.cross_entropy(shuffled(x.double(), weight.double(), bias.double(), 2, 1e-3), target, ignore_index=255)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    line = torch.randn(1, 1, 1024, 2050, device=device).bfloat16()
    x = line.expand(1, 1024, 1024, 2050)
    assert x.numel() > 2**31
    weight = (torch.randn(2, 1024, device=device) / 32).bfloat16()
    target = torch.randint(2, (1, 1024, 2050), device=device, dtype=torch.uint8)
    with segops.use_backend(backend), torch.no_grad():
        loss = dupsample_cross_entropy(x, weight, target, scale_factor=1)
    expected = F.cross_entropy(line.double() * weight.double().sum(1)[:, None, None], target.long())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(13, 3)}, ValueError, r"a multiple of scale_factor \*\* 2 = 4 rows, got 13"),
        ({"weight": torch.zeros(4, 3), "bias": None}, ValueError, "2 classes or more, got 1: .*binary_cross_entropy"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[12\] as weight has rows, got \[4\]"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must be \[K\] = \[3\], got \[4\]"),
        ({"class_weight": torch.ones(3, dtype=torch.int64)}, TypeError, "class_weight must have a floating-point"),
        ({"target": torch.zeros(1, 1, 4, 6).long()}, ValueError, r"target must be \[N, H, W\].*target.squeeze\(1\)"),
        ({"target": torch.zeros(1, 3, 4, 6).long()}, ValueError, r"target must be \[N, H, W\], got 4 axes"),
        ({"target": torch.zeros(1, 4, 6)}, TypeError, "target must have dtype uint8, int16, int32 or int64, got"),
        ({"target": torch.zeros(1, 4, 6, dtype=torch.bool)}, TypeError, "target must have dtype uint8, int16, int32"),
        ({"target": [[1]]}, TypeError, "target must be a tensor of labels, got list"),
        ({"target": torch.zeros(2, 4, 6).long()}, ValueError, r"target must be \[1, H, W\], got \(2, 4, 6\)"),
        ({"target": torch.zeros(1, 5, 6).long()}, ValueError, r"target must have H in \[3, 4\] for 2 cells"),
        ({"target": torch.zeros(1, 4, 4).long()}, ValueError, r"target must have W in \[5, 6\] for 3 cells"),
        ({"target": torch.zeros(1, 4, 6, device="meta").long()}, ValueError, "target must be on device cpu"),
        ({"target": torch.full((1, 4, 6), 3)}, ValueError, r"target must be in \[0, 3\) or ignore_index=255, got 3"),
        ({"temperature": 0}, ValueError, "temperature must be finite and not 0, got 0"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must be in \[0, 1\], got nan"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        ({"denominator": "some"}, ValueError, "denominator must be one of 'valid', 'all', got 'some'"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"x": torch.zeros(1, 3, 2, 3), "weight": torch.zeros(12, 3), "bias": torch.zeros(12), "scale_factor": 2}
    good["target"] = torch.zeros(1, 4, 6, dtype=torch.int64)
    with pytest.raises(error, match=f"dupsample_cross_entropy: .*{message}|dupsample_cross_entropy: {message}"):
        dupsample_cross_entropy(**{**good, **change})


@pytest.mark.parametrize("fused", ["dupsample", "dupsample_cross_entropy", "dupsample_argmax"])
def test_flops_are_those_of_the_convolution(fused):
    x, weight, bias = (x.float().requires_grad_() for x in head(2, 4, 3, 5, 7, 2))
    target = labels((2, 6, 10), 7)
    calls = {
        "dupsample": lambda: segops.dupsample(x, weight, bias, scale_factor=2).sum(),
        "dupsample_cross_entropy": lambda: dupsample_cross_entropy(x, weight, target, bias=bias, scale_factor=2),
        "dupsample_argmax": lambda: segops.dupsample_argmax(x, weight, bias, scale_factor=2),
    }
    counts = []
    for call in (calls[fused], lambda: F.conv2d(x, weight[:, :, None, None], bias).sum()):
        with segops.use_backend("cpu"), FlopCounterMode(display=False) as counter:
            out = call()
            if fused != "dupsample_argmax":
                out.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
