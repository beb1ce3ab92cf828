"""upsample_cross_entropy's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import segops
from segops import upsample_cross_entropy

from .lanes import every_lane
from .test_dupsample_cross_entropy import labels

torch.manual_seed(0)

every_convention = pytest.mark.parametrize("align_corners", [False, True], ids=["half_pixel", "corners"])


def upsampled(logits, size, align_corners=False):
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


@every_lane
@every_convention
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_is_torchs_cross_entropy(lane, align_corners, reduction, weighted, smoothing):
    logits = torch.randn(2, 7, 3, 4, device=lane.device, dtype=torch.float64, requires_grad=True)
    target = labels((2, 8, 11), 7, device=lane.device)
    weight = torch.rand(7, device=lane.device, dtype=torch.float64) + 0.5 if weighted else None
    settings = {"reduction": reduction, "label_smoothing": smoothing}
    expected = F.cross_entropy(upsampled(logits, (8, 11), align_corners), target, weight, ignore_index=255, **settings)
    upstream = torch.randn(expected.shape, device=lane.device, dtype=torch.float64)
    with lane.active():
        actual = upsample_cross_entropy(logits, target, align_corners=align_corners, class_weight=weight, **settings)
        (gradient,) = torch.autograd.grad(actual, logits, upstream)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits, upstream)[0])


SIZES = [((1, 1), (1, 1)), ((1, 1), (3, 4)), ((4, 5), (1, 1)), ((5, 4), (3, 9)), ((2, 3), (7, 3)), ((9, 7), (4, 3)),
         ((3, 2), (48, 2)), ((2, 2), (3, 65))]  # fmt: skip


@every_lane
@every_convention
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_pair_of_sizes(lane, align_corners, sizes):
    logits = torch.randn(1, 3, *sizes[0], device=lane.device, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (1, *sizes[1]), device=lane.device)
    expected = F.cross_entropy(upsampled(logits, sizes[1], align_corners), target)
    with lane.active():
        actual = upsample_cross_entropy(logits, target, align_corners=align_corners)
        (gradient,) = torch.autograd.grad(actual, logits)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


@every_lane
@pytest.mark.parametrize("classes", [2, 1000])
def test_fewest_and_most_classes(lane, classes):
    logits = torch.randn(1, classes, 1, 2, device=lane.device, requires_grad=True)
    target = labels((1, 2, 3), classes, -1, device=lane.device)
    target[0, 0, 0] = 1
    expected = F.cross_entropy(upsampled(logits.double(), (2, 3)), target, ignore_index=-1)
    with lane.active():
        actual = upsample_cross_entropy(logits, target, ignore_index=-1)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
        if lane.slow and classes == 1000:  # interpreted, the gradient takes half a minute
            return
        (gradient,) = torch.autograd.grad(actual, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-6)


@every_lane
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_every_dtype(lane, dtype):
    logits = torch.randn(1, 4, 2, 3, device=lane.device)
    target = labels((1, 4, 6), 4, device=lane.device)
    with lane.active():
        expected = upsample_cross_entropy(logits, target)
        assert torch.equal(upsample_cross_entropy(logits, target.to(dtype)), expected)


@every_lane
@pytest.mark.parametrize("ignore_index", [-100, 2, 156, 70_000])
def test_the_ignored_label_is_compared_as_a_number(lane, ignore_index):
    logits = torch.randn(1, 4, 2, 3, device=lane.device, dtype=torch.float64)
    target = torch.randint(4, (1, 4, 6), device=lane.device, dtype=torch.uint8)
    with lane.active():
        actual = upsample_cross_entropy(logits, target, ignore_index=ignore_index)
    expected = F.cross_entropy(upsampled(logits, (4, 6)), target.long(), ignore_index=ignore_index)
    torch.testing.assert_close(actual, expected)


def mined(logits, target, threshold, min_kept, align_corners=False):
    """semantics.md 1.6 word by word. Returns the loss and which pixels are kept."""
    z = upsampled(logits, target.shape[1:], align_corners)
    valid = target != 255
    label = target.long().where(valid, 0)
    p = z.detach().softmax(1).gather(1, label.unsqueeze(1)).squeeze(1).where(valid, 1.0)
    if min_kept == 0 or min_kept > int(valid.sum()):
        kept = valid
    else:
        ranked = p.flatten().sort().values
        t = max(threshold, float(ranked[min(p.numel(), min_kept) - 1]))
        kept = valid & (p <= t)
    loss = F.cross_entropy(z, label, reduction="none")[kept]
    return loss.mean() if len(loss) else z.sum() * 0, kept


@every_lane
@every_convention
@pytest.mark.parametrize(
    ("threshold", "min_kept"),
    [(0.05, 1), (0.3, 20), (0.3, 140), (0.9, 20), (0.0, 7), (0.3, 0), (0.3, 10**6), (1.0, 3), (0.1, 176)],
)
def test_hard_pixels(lane, align_corners, threshold, min_kept):
    logits = (2 * torch.randn(2, 4, 3, 5, dtype=torch.float64)).to(lane.device).requires_grad_()
    target = labels((2, 8, 11), 4, device=lane.device)
    expected, kept = mined(logits, target, threshold, min_kept, align_corners)
    settings = {"align_corners": align_corners, "ohem_threshold": threshold, "ohem_min_kept": min_kept}
    with lane.active():
        actual = upsample_cross_entropy(logits, target, **settings)
        (gradient,) = torch.autograd.grad(actual, logits)
        every = upsample_cross_entropy(logits, target, reduction="none", **settings)
        total = upsample_cross_entropy(logits, target, reduction="sum", **settings)
        share = upsample_cross_entropy(logits, target, denominator="all", **settings)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert torch.equal(every != 0, kept)
    torch.testing.assert_close(total, expected * kept.sum())
    torch.testing.assert_close(share, expected * kept.sum() / target.numel())


@every_lane
def test_hard_pixels_tied_with_the_threshold_are_kept(lane):
    """Three confidences, many pixels each: the second-smallest is reached within a tie."""
    logits = torch.zeros(1, 2, 1, 24, device=lane.device, dtype=torch.float64)
    logits[0, 0, 0, 8:16] = 1.0
    logits[0, 0, 0, 16:] = 2.0
    target = torch.zeros(1, 1, 24, dtype=torch.uint8, device=lane.device)
    for min_kept, pixels in ((1, 8), (8, 8), (9, 16), (16, 16), (17, 24), (24, 24)):
        with lane.active():
            kept = upsample_cross_entropy(logits, target, reduction="none", ohem_threshold=0.1, ohem_min_kept=min_kept)
        assert int((kept != 0).sum()) == pixels, min_kept
        assert torch.equal(kept != 0, mined(logits, target, 0.1, min_kept)[1])


@every_lane
def test_hard_pixels_are_chosen_by_the_plain_probability(lane):
    """Class weights and smoothing change the loss of the kept pixels, not which are kept."""
    logits = torch.randn(1, 4, 4, 5, device=lane.device, dtype=torch.float64)
    target = labels((1, 8, 10), 4, device=lane.device)
    weight = torch.tensor([0.1, 3.0, 1.0, 0.5], device=lane.device, dtype=torch.float64)
    _, kept = mined(logits, target, 0.2, 30)
    with lane.active():
        actual = upsample_cross_entropy(
            logits, target, class_weight=weight, label_smoothing=0.2, ohem_threshold=0.2, ohem_min_kept=30
        )
    expected = F.cross_entropy(
        upsampled(logits, (8, 10)), target.masked_fill(~kept, 255), weight, ignore_index=255, label_smoothing=0.2
    )
    torch.testing.assert_close(actual, expected)


@every_lane
@pytest.mark.parametrize("settings", [{}, {"denominator": "all"}, {"ohem_threshold": 0.7}, {"reduction": "none"},
                                      {"ohem_threshold": 0.7, "ohem_min_kept": 3}], ids=str)  # fmt: skip
def test_no_counted_pixel_gives_0_and_no_gradient(lane, settings):
    logits = torch.randn(1, 3, 2, 2, device=lane.device, requires_grad=True)
    target = torch.full((1, 4, 4), 255, dtype=torch.uint8, device=lane.device)
    with lane.active():
        loss = upsample_cross_entropy(logits, target, label_smoothing=0.1, **settings)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_lane
def test_a_label_out_of_range(lane):
    logits = torch.randn(2, 4, 2, 3, device=lane.device)
    target = labels((2, 4, 6), 4, device=lane.device)
    target[0, 3, 5], target[1, 2, 3] = -1, 4
    expected = target.masked_fill((target < 0) | (target >= 4), 255)
    with lane.active():
        with pytest.raises(
            ValueError,
            match=r"upsample_cross_entropy: target must be in \[0, 4\) or ignore_index=255, got -1 at \[0, 3, 5\]",
        ):
            upsample_cross_entropy(logits, target, check_labels=True)
        unchecked = upsample_cross_entropy(logits, target, check_labels=False, ohem_threshold=0.9, ohem_min_kept=3)
        wanted = upsample_cross_entropy(logits, expected, ohem_threshold=0.9, ohem_min_kept=3)
    assert torch.equal(unchecked, wanted)


@every_lane
def test_large_logits_do_not_overflow(lane):
    logits = 1e3 * torch.randn(1, 5, 2, 3, device=lane.device)
    target = labels((1, 6, 7), 5, device=lane.device)
    with lane.active():
        actual = upsample_cross_entropy(logits, target)
    expected = F.cross_entropy(upsampled(logits.double(), (6, 7)), target, ignore_index=255)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)


@every_lane
@pytest.mark.parametrize("spread", [1.0, 1e-7], ids=["apart", "alike"])
def test_huge_logits_keep_gradients_bounded(lane, spread):
    """A probability is at most 1, also where the rounding of lse exceeds the logits' distances."""
    logits = (1e30 * (1 + spread * torch.randn(1, 5, 2, 3, device=lane.device))).requires_grad_()
    target = labels((1, 6, 7), 5, device=lane.device)
    with lane.active():
        (gradient,) = torch.autograd.grad(upsample_cross_entropy(logits, target, reduction="sum"), logits)
    assert (gradient.abs() <= target.numel()).all()


@every_lane
def test_nan_reaches_the_gradient(lane):
    logits = torch.randn(1, 5, 2, 3, device=lane.device)
    logits[0, 2, 0, 0] = torch.nan
    logits.requires_grad_()
    target = torch.randint(5, (1, 6, 7), device=lane.device)
    with lane.active():
        (gradient,) = torch.autograd.grad(upsample_cross_entropy(logits, target), logits)
    assert gradient[0, :, 0, 0].isnan().all()
    assert gradient[0, :, :, 2].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    column = torch.randn(1, 1000, 1, 1, device=device).bfloat16()
    logits = column.expand(1, 1000, 1024, 2100)
    assert logits.numel() > 2**31
    target = torch.randint(1000, (1, 33, 47), device=device, dtype=torch.int16)
    with segops.use_backend(backend), torch.no_grad():
        loss = upsample_cross_entropy(logits, target, ignore_index=-1)  # 255 is a class
    expected = F.cross_entropy(column.double().expand(1, 1000, 33, 47), target.long())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 2, 3)}, ValueError, r"logits must be \[N, K, h, w\], got 3 axes"),
        ({"logits": torch.zeros(1, 1, 2, 3)}, ValueError, "2 classes or more, got 1: .*binary_cross_entropy_with"),
        (
            {"logits": torch.zeros(1, 3, 0, 3)},
            ValueError,
            r"logits must have height and width >= 1, got \(1, 3, 0, 3\)",
        ),
        ({"target": torch.zeros(1, 0, 6).long()}, ValueError, r"target must have height and width >= 1"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must be \[K\] = \[3\], got \[4\]"),
        ({"target": torch.zeros(1, 1, 4, 6).long()}, ValueError, r"target must be \[N, H, W\].*target.squeeze\(1\)"),
        ({"target": torch.zeros(1, 4, 6)}, TypeError, "target must have dtype uint8, int16, int32 or int64, got"),
        ({"target": torch.zeros(2, 4, 6).long()}, ValueError, r"target must be \[1, H, W\], got \(2, 4, 6\)"),
        ({"target": torch.full((1, 4, 6), 3)}, ValueError, r"target must be in \[0, 3\) or ignore_index=255, got 3"),
        ({"ohem_threshold": 1.1}, ValueError, r"ohem_threshold must be in \[0, 1\], got 1.1"),
        ({"ohem_threshold": 0.7, "ohem_min_kept": -1}, ValueError, "ohem_min_kept must be at least 0, got -1"),
        ({"ohem_threshold": 0.7, "ohem_min_kept": 0.5}, TypeError, "ohem_min_kept must be an int, got 0.5"),
        ({"label_smoothing": "some"}, TypeError, "label_smoothing must be a number, got 'some'"),
        ({"reduction": None}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got None"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"logits": torch.zeros(1, 3, 2, 3), "target": torch.zeros(1, 4, 6, dtype=torch.int64)}
    with pytest.raises(error, match=f"upsample_cross_entropy: .*{message}|upsample_cross_entropy: {message}"):
        upsample_cross_entropy(**{**good, **change})
