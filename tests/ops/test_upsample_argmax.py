"""upsample_argmax's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import pytest
import torch

import segops
from segops import upsample_argmax

from .lanes import every_lane
from .test_upsample_cross_entropy import SIZES, every_convention, upsampled

torch.manual_seed(0)


@every_lane
@every_convention
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_is_the_argmax_of_torchs_interpolation(lane, align_corners, sizes):
    logits = torch.randn(2, 5, *sizes[0], device=lane.device, dtype=torch.float64)
    with lane.active():
        actual, confidence = upsample_argmax(logits, sizes[1], align_corners=align_corners, return_confidence=True)
    expected = upsampled(logits, sizes[1], align_corners)
    assert actual.dtype == torch.uint8
    assert torch.equal(actual.long(), expected.argmax(1))
    torch.testing.assert_close(confidence, expected.softmax(1).amax(1))


@every_lane
@every_convention
def test_a_list_averages_the_softmaxes(lane, align_corners):
    sizes = ((3, 4), (5, 2), (2, 7))
    maps = [3 * torch.randn(2, 6, *size, device=lane.device, dtype=torch.float64) for size in sizes]
    with lane.active():
        actual, confidence = upsample_argmax(maps, (8, 9), align_corners=align_corners, return_confidence=True)
        assert torch.equal(actual, upsample_argmax(tuple(maps), (8, 9), align_corners=align_corners))
        once = upsample_argmax(maps[:1], (8, 9), align_corners=align_corners)
        assert torch.equal(once, upsample_argmax(maps[0], (8, 9), align_corners=align_corners))
    mean = torch.stack([upsampled(z, (8, 9), align_corners).softmax(1) for z in maps]).mean(0)
    assert torch.equal(actual.long(), mean.argmax(1))
    torch.testing.assert_close(confidence, mean.amax(1))


@every_lane
@pytest.mark.parametrize("classes", [2, 255, 256, 1000])
def test_fewest_and_most_classes(lane, classes):
    logits = torch.randn(1, classes, 2, 3, device=lane.device, dtype=torch.float64)
    with lane.active():
        actual = upsample_argmax(logits, (5, 7))
    assert actual.dtype == (torch.uint8 if classes <= 255 else torch.int64)
    assert torch.equal(actual.long(), upsampled(logits, (5, 7)).argmax(1))


@every_lane
def test_the_lowest_class_wins_a_tie(lane):
    logits = torch.zeros(1, 40, 2, 3, device=lane.device)
    logits[:, [9, 17, 33]] = 1.0
    with lane.active():
        assert (upsample_argmax(logits, (5, 7)) == 9).all()
        assert (upsample_argmax([logits, logits.flip(3)], (5, 7)) == 9).all()
        assert (upsample_argmax(torch.zeros_like(logits), (5, 7)) == 0).all()


@every_lane
def test_scale_factor_stands_for_a_size(lane):
    logits = torch.randn(1, 3, 5, 7, device=lane.device)
    with lane.active():
        assert upsample_argmax(logits, scale_factor=2).shape == (1, 10, 14)
        assert torch.equal(upsample_argmax(logits, scale_factor=1.5), upsample_argmax(logits, (7, 10)))
        assert torch.equal(upsample_argmax(logits, 9), upsample_argmax(logits, (9, 9)))


@every_lane
def test_has_no_gradient(lane):
    logits = torch.randn(1, 3, 2, 2, device=lane.device, requires_grad=True)
    with lane.active():
        actual, confidence = upsample_argmax(logits, (3, 4), return_confidence=True)
    assert not actual.requires_grad
    assert not confidence.requires_grad


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    column = torch.randperm(1000, device=device)[None, :, None, None].bfloat16()
    logits = column.expand(1, 1000, 1024, 2100)
    assert logits.numel() > 2**31
    with segops.use_backend(backend):
        actual = upsample_argmax(logits, (33, 47))
    assert (actual == column.flatten().argmax()).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": []}, ValueError, r"logits must be a tensor or a list of at least one, got \[\]"),
        ({"logits": None}, ValueError, "logits must be a tensor or a list of at least one, got None"),
        (
            {"logits": [torch.zeros(1, 3, 2, 3), torch.zeros(3, 2, 3)]},
            ValueError,
            r"logits\[1\] must be \[N, K, h, w\]",
        ),
        ({"logits": [torch.zeros(1, 3, 2, 3), torch.zeros(1, 4, 2, 3)]}, ValueError, r"logits\[1\] must have the N, K"),
        (
            {"logits": [torch.zeros(1, 3, 2, 3), torch.zeros(1, 3, 2, 3).half()]},
            ValueError,
            r"logits\[1\] must have the",
        ),
        ({"logits": torch.zeros(1, 1, 2, 3)}, ValueError, "2 classes or more, got 1: .*> 0"),
        ({"logits": torch.zeros(1, 3, 2, 0)}, ValueError, r"logits must have h, w >= 1, got \(1, 3, 2, 0\)"),
        ({"logits": torch.zeros(1, 3, 2, 3).long()}, TypeError, "logits must have a floating-point dtype"),
        ({"size": None}, ValueError, "one of size and scale_factor must be given, got size=None, scale_factor=None"),
        ({"scale_factor": 2}, ValueError, r"one of size and scale_factor must be given, got size=\(4, 6\)"),
        ({"size": None, "scale_factor": 0.1}, ValueError, "scale_factor must leave a pixel, got 0.1"),
        ({"size": None, "scale_factor": "2"}, TypeError, "scale_factor must be a number, got '2'"),
        ({"size": (0, 3)}, ValueError, r"size must be at least 1, got \(0, 3\)"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"logits": torch.zeros(1, 3, 2, 3), "size": (4, 6)}
    with pytest.raises(error, match=f"upsample_argmax: .*{message}|upsample_argmax: {message}"):
        upsample_argmax(**{**good, **change})
