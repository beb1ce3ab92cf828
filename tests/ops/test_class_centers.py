"""Laws of class_centers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import segops
from segops import _dispatch
from segops.reference.class_centers import nearest

from .lanes import every_lane


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes_of(*shape, classes, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, 255)


@every_lane
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
def test_is_the_mean_over_the_pixels_of_a_class(lane, per_image):
    x, y = normal(3, 6, 5, 7).to(lane.device), classes_of(3, 5, 7, classes=4).to(lane.device)
    y[0] = y[0].where(y[0] != 2, 3)
    x.requires_grad_()
    upstream = normal(*((3, 4, 6) if per_image else (4, 6)), seed=1).to(lane.device)
    with lane.active():
        centers, counts = segops.class_centers(x, y, 4, per_image=per_image)
        (gradient,) = torch.autograd.grad(centers, x, upstream)
    groups = [slice(n, n + 1) for n in range(3)] if per_image else [slice(None)]
    expected = torch.zeros_like(x)
    for n, images in enumerate(groups):
        for k in range(4):
            mine = y[images] == k
            members = x[images].permute(0, 2, 3, 1)[mine]
            at = (n, k) if per_image else (k,)
            assert counts[at] == len(members)
            torch.testing.assert_close(
                centers[at], members.mean(0) if len(members) else torch.zeros_like(x[0, :, 0, 0])
            )
            share = upstream[at] / max(len(members), 1)
            expected[images] += share[:, None, None] * mine[:, None]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("large", "small", "rows"),
    [(5, 3, [0, 2, 4]), (4, 2, [0, 3]), (4, 3, [0, 2, 3]), (7, 1, [0]), (8, 5, [0, 2, 4, 5, 7]), (3, 3, [0, 1, 2])],
)
def test_larger_labels_are_read_at_the_nearest_pixel_and_halves_round_up(large, small, rows):
    labels = torch.arange(large)[None, :, None].expand(1, large, 3)
    assert nearest(labels, small, 3)[0, :, 1].tolist() == rows
    assert nearest(labels.mT, 3, small)[0, 1].tolist() == rows
    counts = segops.class_centers(torch.zeros(1, 1, small, 3), labels, large + 1).counts
    assert counts.nonzero().flatten().tolist() == rows


@every_lane
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_every_dtype(lane, dtype):
    x, y = normal(2, 3, 4, 5).to(lane.device), classes_of(2, 4, 5, classes=3).to(lane.device)
    with lane.active():
        for a, b in zip(segops.class_centers(x, y.to(dtype), 3), segops.class_centers(x, y, 3), strict=True):
            assert torch.equal(a, b)


@every_lane
def test_smooth_and_scattered_labels_agree(lane):
    """The order of the pixels changes no more than rounding."""
    x, y = normal(2, 35, 9, 16).to(lane.device), classes_of(2, 9, 16, classes=3).to(lane.device)
    order = y.flatten().argsort(stable=True)
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 35)[order]
    with lane.active():
        scattered = segops.class_centers(x, y, 3)
        smooth = segops.class_centers(
            pixels.view(2, 9, 16, 35).permute(0, 3, 1, 2), y.flatten()[order].view(2, 9, 16), 3
        )
    torch.testing.assert_close(smooth.centers, scattered.centers)
    assert torch.equal(smooth.counts, scattered.counts)


@every_lane
def test_long_sums_lose_little(lane):
    if lane.slow:
        pytest.skip("interpreted and emulated lanes are slow")
    x = 1 + normal(1, 3, 400, 500, dtype=torch.float32).to(lane.device) / 100
    y = torch.zeros(1, 400, 500, dtype=torch.uint8, device=lane.device)
    with lane.active():
        centers, _ = segops.class_centers(x, y, 2)
    tolerance = 1e-4 if lane.backend == "reference" else 2e-6
    assert (centers[0] - x.double().mean((0, 2, 3))).abs().max() < tolerance


@every_lane
def test_check_labels(lane):
    x, y = normal(1, 2, 2, 3).to(lane.device), torch.tensor([[[0, 1, 2], [3, 255, 1]]], device=lane.device)
    with lane.active():
        with pytest.raises(
            ValueError, match=r"class_centers: labels must be in \[0, 3\) or ignore_index=255, got 3 at"
        ):
            segops.class_centers(x, y, 3, check_labels=True)
        counts = segops.class_centers(x, y, 3, check_labels=False).counts
    assert counts.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("features", "labels", "classes", "error", "message"),
    [
        ((2, 3, 4), (2, 4, 4), 3, ValueError, r"features must be \[N, C, h, w\], got 3 axes"),
        ((2, 3, 0, 4), (2, 4, 4), 3, ValueError, "features must have C, h, w >= 1"),
        ((2, 3, 4, 4), (1, 4, 4), 3, ValueError, r"labels must be \[2, H, W\] with H >= 4 and W >= 4"),
        ((2, 3, 4, 4), (2, 4, 3), 3, ValueError, r"the features' size, got \(2, 4, 3\)"),
        ((2, 3, 4, 4), (2, 1, 4, 4), 3, ValueError, r"pass labels.squeeze\(1\)"),
        ((2, 3, 4, 4), (2, 4, 4), 1, ValueError, "num_classes must be at least 2, got 1"),
        ((2, 3, 4, 4), (2, 4, 4), 2.0, TypeError, "num_classes must be an int"),
    ],
)
def test_wrong_arguments(features, labels, classes, error, message):
    with pytest.raises(error, match=message):
        segops.class_centers(torch.zeros(features), torch.zeros(labels, dtype=torch.int64), classes)


def test_wrong_dtypes_and_groups():
    x, y = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"labels must have dtype uint8, int16, int32 or int64, got torch\.float32"):
        segops.class_centers(x, y.float(), 2)
    with pytest.raises(TypeError, match="features must have a floating-point dtype"):
        segops.class_centers(x.int(), y, 2)
    with pytest.raises(TypeError, match="per_image must be a bool"):
        segops.class_centers(x, y, 2, per_image=1)
    with pytest.raises(ValueError, match=r"sync needs torch\.distributed\.init_process_group"):
        segops.class_centers(x, y, 2, sync=True)


def test_second_derivative():
    x, y = normal(2, 3, 4, 5).requires_grad_(), classes_of(2, 4, 5, classes=3)
    square = segops.class_centers(x, y, 3).centers.square().sum()
    (first,) = torch.autograd.grad(square, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    mine = F.one_hot(y.clamp(max=3), 4)[..., :3].double()
    counts = mine.sum((0, 1, 2)).clamp(min=1)
    centers = torch.einsum("nchw,nhwk->kc", x, mine) / counts[:, None]
    # first = 2 mu_y / c_y, so sum first^2 = sum_k 4 |mu_k|^2 / c_k
    expected = torch.einsum("kc,nhwk->nchw", 8 * centers / counts.square()[:, None], mine)
    torch.testing.assert_close(second, expected)


@every_lane
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_reaches_its_class_alone(lane, value):
    x, y = normal(2, 3, 5, 7).to(lane.device), classes_of(2, 5, 7, classes=4).to(lane.device)
    y[0, 1, :3] = torch.tensor([255, 2, 2])
    x[0, :, 1, 0] = torch.nan  # ignored
    x[0, 1, 1, 1] = value
    with lane.active():
        centers = segops.class_centers(x, y, 4).centers
    assert centers.isfinite().logical_not().nonzero().tolist() == [[2, 1]]
    assert str(centers[2, 1].item()) == str(value)
    x[0, 1, 1, 2] = -value  # inf - inf
    with lane.active():
        assert segops.class_centers(x, y, 4).centers[2, 1].isnan()


@pytest.mark.parametrize("shape", [(16, 512, 17, 17), (8, 512, 64, 64), (2, 64, 5, 7), (1, 256, 129, 129)], ids=str)
@pytest.mark.parametrize("classes", [19, 150, 847])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_triton_stores_is_little_beside_the_features(shape, classes, per_image, dtype):
    """Planned on no device. One table of sums is the least."""
    pytest.importorskip("triton", reason="triton is not installed")
    kernels = _dispatch.kernels("class_centers")
    n, c, h, w = shape
    features, labels = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(n, h, w, device="meta").byte()
    sums = torch.empty((n, classes, c) if per_image else (classes, c), device="meta")
    args = kernels._plan_forward(sums, features, labels, 255).args
    assert args["sums"].nbytes <= max(sums.nbytes, features.nbytes // 16)
    assert args["parts"] <= args["units"]
