"""dupsample_argmax's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import pytest
import torch

import segops
from segops import dupsample_argmax

from .lanes import every_lane
from .test_dupsample import head, shuffled

torch.manual_seed(0)


@every_lane
@pytest.mark.parametrize("temperature", [None, 0.4, -0.4])
def test_is_the_argmax_of_torchs_layers(lane, temperature):
    """A negative temperature makes it the argmin."""
    x, weight, bias = head(2, 5, 3, 2, 7, 3, lane.device)
    with lane.active():
        actual, confidence = dupsample_argmax(
            x, weight, bias, scale_factor=3, temperature=temperature, size=(8, 5), return_confidence=True
        )
    logits = shuffled(x, weight, bias, 3, temperature or 1.0)[:, :, :8, :5]
    assert actual.dtype == torch.uint8
    assert torch.equal(actual.long(), logits.argmax(1))
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1))


@every_lane
@pytest.mark.parametrize(("classes", "r"), [(2, 1), (2, 32), (255, 2), (256, 2), (1000, 1)])
def test_fewest_and_most_classes_and_scales(lane, classes, r):
    x, weight, bias = head(1, 4, 1, 1, classes, r, lane.device)
    with lane.active():
        actual = dupsample_argmax(x, weight, bias, scale_factor=r)
    assert actual.dtype == (torch.uint8 if classes <= 255 else torch.int64)
    assert torch.equal(actual.long(), shuffled(x, weight, bias, r).argmax(1))


@every_lane
def test_the_lowest_class_wins_a_tie(lane):
    x = torch.ones(1, 2, 2, 3, device=lane.device)
    weight = torch.zeros(4 * 40, 2, device=lane.device)
    weight.view(4, 40, 2)[:, [9, 17, 33]] = 1.0
    with lane.active():
        actual, confidence = dupsample_argmax(x, weight, scale_factor=2, return_confidence=True)
        none, _ = dupsample_argmax(x, torch.zeros_like(weight), scale_factor=2, return_confidence=True)
    assert (actual == 9).all()
    assert (none == 0).all()
    expected = torch.tensor([2.0] * 3 + [0.0] * 37).softmax(0)[0]
    torch.testing.assert_close(confidence.cpu(), expected.expand(1, 4, 6))


@every_lane
def test_has_no_gradient(lane):
    x, weight, bias = (x.requires_grad_() for x in head(1, 3, 2, 2, 3, 2, lane.device))
    with lane.active():
        actual, confidence = dupsample_argmax(x, weight, bias, scale_factor=2, return_confidence=True)
    assert not actual.requires_grad
    assert not confidence.requires_grad


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    line = torch.randn(1, 1, 1024, 2050, device=device).bfloat16()
    x = line.expand(1, 1024, 1024, 2050)
    assert x.numel() > 2**31
    weight = (torch.randn(2, 1024, device=device) / 32).bfloat16()
    with segops.use_backend(backend):
        actual = dupsample_argmax(x, weight, scale_factor=1)
    logits = line.double() * weight.double().sum(1)[:, None, None]
    apart = (logits[:, 0] - logits[:, 1]).abs() > 1e-3
    assert torch.equal(actual[apart].long(), logits.argmax(1)[apart])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(4, 3)}, ValueError, r"2 classes or more, got 1: .*segops.dupsample\(...\) > 0"),
        ({"weight": torch.zeros(13, 3)}, ValueError, r"a multiple of scale_factor \*\* 2 = 4 rows, got 13"),
        ({"size": 3}, ValueError, r"size must have W in \[5, 6\] for 3 cells and scale_factor=2, got 3"),
        ({"temperature": float("inf")}, ValueError, "temperature must be finite and not 0, got inf"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"x": torch.zeros(1, 3, 2, 3), "weight": torch.zeros(12, 3), "scale_factor": 2}
    with pytest.raises(error, match=f"dupsample_argmax: .*{message}|dupsample_argmax: {message}"):
        dupsample_argmax(**{**good, **change})
