"""Laws of car_losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import segops

from .lanes import every_lane
from .test_class_centers import classes_of, normal


def by_hand(x, y, classes, weights, *, per_image=False, mask=False, c2c_threshold=0.5, c2p_threshold=0.25):
    """The losses, and the gradient of their weighted sum, from one-hot labels and the derivatives' closed forms."""
    n, c, h, w = x.shape
    x = x.double().flatten(2).mT  # [N, P, C]
    hot = F.one_hot(y.long().flatten(1).where(y.flatten(1) != 255, classes), classes + 1)[..., :classes].double()
    known = hot.sum(2)
    groups = hot if per_image else hot.reshape(1, -1, classes)
    rows = x if per_image else x.reshape(1, -1, c)
    counts = groups.sum(1)
    mu = (groups.mT @ rows) / counts.clamp(min=1)[..., None]  # [G, K, C]
    mine = mu.expand(n, -1, -1)
    scale = c**-0.5

    d = known[..., None] * (hot @ mine - x)
    mean = d.abs().mean()
    intra = max(mean.item() ** 2, 1e-5)
    gradient = weights[0] * 2 * mean * -d.sign() * (mean**2 > 1e-5) / d.numel()

    a = (mu @ mu.mT * scale).softmax(2)
    away = 1 - torch.eye(classes, dtype=torch.float64)
    over = (a > c2c_threshold / (classes - 1)) * away
    e = ((a - c2c_threshold / (classes - 1)) * over).sum(2)
    inside = ((e > 1e-7) & (e < 1 - 1e-7)).double()
    mean_e = e.clamp(1e-7, 1 - 1e-7).mean()
    outer = 2 * mean_e / e.numel() * inside[..., None]
    d_logit = outer * a * (over - (a * over).sum(2, keepdim=True))
    d_mu = d_logit @ mu * scale / counts.clamp(min=1)[..., None]
    gradient = gradient + weights[1] * (hot @ d_mu.expand(n, -1, -1))

    own = mine.square().sum(2)[:, None]
    b = (torch.where(hot > 0, own, x @ mine.mT) * scale).softmax(2)
    over = (b > c2p_threshold / (classes - 1)) * (1 - hot)
    e = ((b - c2p_threshold / (classes - 1)) * over).sum(2)
    counted = known if mask else torch.ones_like(known)
    inside = ((e > 1e-7) & (e < 1 - 1e-7)) * counted
    mean_p = (e.clamp(1e-7, 1 - 1e-7) * counted).sum() / counted.sum()
    d_energy = 2 * mean_p / counted.sum() * inside[..., None] * b * (over - (b * over).sum(2, keepdim=True)) * (1 - hot)
    gradient = gradient + weights[2] * (d_energy @ mine) * scale
    return (intra, mean_e**2, mean_p**2), gradient.mT.reshape(n, c, h, w)


@every_lane
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
@pytest.mark.parametrize("mask", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("thresholds", [(0.5, 0.25), (0.9, 1.3)], ids=str)
def test_losses_and_gradients_by_hand(lane, per_image, mask, thresholds):
    x, y = normal(3, 6, 5, 7), classes_of(3, 5, 7, classes=5)
    y[0] = y[0].where(y[0] != 2, 3)
    weights = torch.tensor([0.7, 1.9, 1.3], dtype=torch.float64)
    settings = {"per_image": per_image, "c2c_threshold": thresholds[0], "c2p_threshold": thresholds[1]}
    losses, gradient = by_hand(x, y, 5, weights, mask=mask, **settings)
    x = x.to(lane.device).requires_grad_()
    with lane.active():
        actual = torch.stack(segops.car_losses(x, y.to(lane.device), 5, mask_ignored_c2p=mask, **settings))
        (found,) = torch.autograd.grad(actual, x, weights.to(lane.device))
    torch.testing.assert_close(actual.cpu(), torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(found.cpu(), gradient)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def every_other(x):
    return torch.stack([torch.full_like(x, torch.nan), x], -1).flatten(3)[..., 1::2]


@every_lane
@pytest.mark.parametrize("layout", [channels_last, every_other])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_centres_in_any_layout(lane, layout, dtype):
    x, y = normal(2, 19, 5, 9).to(lane.device, dtype), classes_of(2, 5, 9, classes=7).to(lane.device)
    results = []
    for features in (x.clone().requires_grad_(), layout(x).requires_grad_()):
        with lane.active():
            losses = torch.stack(segops.car_losses(features, y, 7))
            (gradient,) = torch.autograd.grad(losses.sum(), features)
        results.append((losses, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@every_lane
def test_given_centres(lane):
    """c2c and its gradient are the given centres' alone; the rest takes them as constants."""
    x, y = normal(2, 6, 4, 5).to(lane.device).requires_grad_(), classes_of(2, 4, 5, classes=4).to(lane.device)
    centers = normal(4, 6, seed=5).to(lane.device).requires_grad_()
    with lane.active():
        own = segops.car_losses(x, y, 4)
        same = segops.car_losses(x, y, 4, centers=segops.class_centers(x.detach(), y, 4).centers)
        losses = segops.car_losses(x, y, 4, centers=centers)
        of_c2c = torch.autograd.grad(losses.c2c, (x, centers), retain_graph=True, allow_unused=True)
        of_rest = torch.autograd.grad(losses.intra + losses.c2p, (x, centers), allow_unused=True)
        (away,) = torch.autograd.grad(segops.car_losses(x, y, 4).intra + segops.car_losses(x, y, 4).c2p, x)
        (kept,) = torch.autograd.grad(same.intra + same.c2p, x)
    for a, b in zip(own, same, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(away, kept)
    assert not same.c2c.requires_grad
    assert of_c2c[0] is None
    assert of_c2c[1].any()
    assert of_rest[0].any()
    assert of_rest[1] is None


@every_lane
@pytest.mark.parametrize("given", [False, True], ids=["own centres", "given centres"])
def test_all_pixels_ignored(lane, given):
    x = normal(2, 3, 4, 4).to(lane.device).requires_grad_()
    y = torch.full((2, 8, 8), 255, device=lane.device)
    centers = normal(5, 3).to(lane.device) if given else None
    with lane.active():
        losses = segops.car_losses(x, y, 5, centers=centers)
        (gradient,) = torch.autograd.grad(sum(losses), x)
    assert not any(losses)
    assert not gradient.any()


@every_lane
def test_gradient_at_thresholds_and_clips_is_zero(lane):
    """One foreign class has 1/2 of the softmax: at the threshold 1/2 nothing moves, below it the pixel does."""
    x = torch.zeros(1, 4, 1, 1, dtype=torch.float64, device=lane.device, requires_grad=True)
    y = torch.zeros(1, 1, 1, dtype=torch.int64, device=lane.device)
    centers = torch.tensor([[0.0, 0, 0, 0], [1.0, 2, 3, 4]], dtype=torch.float64, device=lane.device)
    with lane.active():
        for threshold, moves in ((0.5, False), (0.4, True)):
            c2p = segops.car_losses(x, y, 2, centers=centers, c2p_threshold=threshold).c2p
            (gradient,) = torch.autograd.grad(c2p, x)
            assert bool(gradient.any()) == moves
        # The same pixel so near to the foreign class that e is clipped at 1 - 1e-7.
        near = torch.full_like(x, 50.0).requires_grad_()
        c2p = segops.car_losses(near, y, 2, centers=centers, c2p_threshold=0.0).c2p
        (gradient,) = torch.autograd.grad(c2p, near)
    torch.testing.assert_close(c2p.item(), (1 - 1e-7) ** 2)
    assert not gradient.any()


@every_lane
def test_thresholds_and_clips_of_float64_are_float64(lane):
    x = torch.zeros(1, 4, 1, 1, dtype=torch.float64, device=lane.device)
    y = torch.zeros(1, 1, 1, dtype=torch.int64, device=lane.device)
    centers = torch.zeros(2, 4, dtype=torch.float64, device=lane.device)
    with lane.active():
        for threshold, excess in ((0.3, 0.2), (0.7, 1e-7)):
            c2p = segops.car_losses(x, y, 2, centers=centers, c2p_threshold=threshold).c2p
            torch.testing.assert_close(c2p.item(), excess**2, rtol=1e-13, atol=0)


@every_lane
def test_intra_is_at_least_1e_5(lane):
    y = torch.tensor([[[0, 1, 1]]], device=lane.device)
    x = torch.tensor([1.0, 3.0, 3.002], dtype=torch.float64, device=lane.device).view(1, 1, 1, 3).requires_grad_()
    with lane.active():
        intra = segops.car_losses(x, y, 2).intra
        (gradient,) = torch.autograd.grad(intra, x)
    assert intra == 1e-5
    assert not gradient.any()


@every_lane
def test_second_derivative_is_that_of_the_reference(lane):
    x, y = normal(2, 5, 3, 4).to(lane.device), classes_of(2, 3, 4, classes=3).to(lane.device)
    seconds = []
    for active in (lane.active(), segops.use_backend("reference")):
        with active:
            features = x.clone().requires_grad_()
            losses = torch.stack(segops.car_losses(features, y, 3))
            (first,) = torch.autograd.grad(losses.sum(), features, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), features)[0])
    assert seconds[0].any()
    torch.testing.assert_close(*seconds)


@every_lane
def test_autocast_changes_nothing(lane):
    x, y = normal(2, 5, 3, 4, dtype=torch.float32).to(lane.device), classes_of(2, 3, 4, classes=3).to(lane.device)
    with lane.active():
        plain = segops.car_losses(x, y, 3)
        with torch.autocast(lane.device, dtype=torch.bfloat16):
            lowered = segops.car_losses(x, y, 3)
    for a, b in zip(plain, lowered, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@every_lane
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_large_features_stay_finite(lane, scale):
    x, y = (
        scale * normal(1, 8, 3, 5, dtype=torch.float32).to(lane.device),
        classes_of(1, 3, 5, classes=4).to(lane.device),
    )
    x.requires_grad_()
    with lane.active():
        losses = segops.car_losses(x, y, 4)
        (gradient,) = torch.autograd.grad(sum(losses), x)
    assert all(loss.isfinite() for loss in losses)
    assert gradient.isfinite().all()


@every_lane
def test_check_labels_and_centres(lane):
    x, y = normal(1, 2, 2, 3).to(lane.device), torch.tensor([[[0, 1, 2], [3, 255, 1]]], device=lane.device)
    centers = normal(3, 2).to(lane.device)
    with lane.active():
        for given in (None, centers):
            with pytest.raises(
                ValueError, match=r"car_losses: labels must be in \[0, 3\) or ignore_index=255, got 3 at \[0, 1, 0\]"
            ):
                segops.car_losses(x, y, 3, centers=given, check_labels=True)
        ignored = segops.car_losses(x, y, 3, check_labels=False)
        y[y == 3] = 255
        for a, b in zip(ignored, segops.car_losses(x, y, 3), strict=True):
            assert torch.equal(a, b)
        centers[1, 0] = torch.inf
        with pytest.raises(ValueError, match=r"car_losses: centers must be finite, got inf at \[1, 0\]"):
            segops.car_losses(x, y, 3, centers=centers, check_labels=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": (2, 3, 4)}, ValueError, r"car_losses: labels must be \[2, H, W\] with H >= 4 and W >= 4"),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
        ({"centers": (5, 2)}, ValueError, r"centers must be \[K, C\] = \[5, 3\], got \[5, 2\]"),
        ({"centers": (2, 5, 3)}, ValueError, r"centers must be \[K, C\], got 3 axes"),
        ({"centers": (5, 3), "per_image": True}, ValueError, r"centers must be \[N, K, C\], got 2 axes"),
        ({"c2c_threshold": -0.1}, ValueError, r"c2c_threshold must be in \[0, 5\]"),
        ({"c2p_threshold": float("nan")}, ValueError, r"c2p_threshold must be in \[0, 5\]"),
        ({"c2p_threshold": "1"}, TypeError, "c2p_threshold must be a number"),
        ({"mask_ignored_c2p": 1}, TypeError, "mask_ignored_c2p must be a bool"),
        ({"sync": True}, ValueError, "sync needs torch.distributed.init_process_group"),
    ],
)
def test_wrong_arguments(changes, error, message):
    arguments = {"num_classes": 5} | changes
    labels = torch.zeros(arguments.pop("labels", (2, 4, 4)), dtype=torch.int64)
    if "centers" in arguments:
        arguments["centers"] = torch.zeros(arguments["centers"])
    with pytest.raises(error, match=message):
        segops.car_losses(torch.zeros(2, 3, 4, 4), labels, **arguments)


def test_explain_names_the_op_itself():
    explanation = segops.explain(segops.car_losses, torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8), 3)
    assert explanation.op == "car_losses"


def test_flops_are_the_products_with_the_centres():
    x, y = normal(2, 6, 5, 7).requires_grad_(), classes_of(2, 5, 7, classes=4)
    with FlopCounterMode(display=False) as counter:
        segops.car_losses(x, y, 4).c2p.backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts["segops.car_losses"] == 2 * 2 * 35 * 6 * 4
    assert counts["segops.car_losses_backward"] == 2 * counts["segops.car_losses"]


@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "image"])
def test_own_centres_compile_into_one_graph_of_any_size(per_image):
    """The battery's sample for this is given its centres."""

    def losses(x, y):
        return torch.stack(segops.car_losses(x, y, 4, per_image=per_image))

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend="aot_eager")
    for h, w in ((3, 5), (6, 4)):
        x, y = normal(2, 5, h, w).requires_grad_(), classes_of(2, 2 * h, 3 * w, classes=4)
        actual, expected = compiled(x, y), losses(x, y)
        gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected)]
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*gradients)


def test_own_centres_export():
    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return segops.car_losses(x, y, 4)

    x, y = normal(2, 5, 3, 4), classes_of(2, 6, 8, classes=4)
    program = torch.export.export(Loss(), (x, y))
    for actual, expected in zip(program.module()(x, y), segops.car_losses(x, y, 4), strict=True):
        assert torch.equal(actual, expected)


@every_lane
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["given", "own"])
@pytest.mark.parametrize("mask", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("label", [255, 1])
def test_what_is_not_finite_is_not_hidden(lane, value, own, mask, label):
    """A scaler of mixed precision skips a step by what is not finite in the gradient."""
    x, y = normal(2, 6, 5, 7), classes_of(2, 5, 7, classes=4)
    x[1, 2, 3, 4], y[1, 3, 4] = value, label
    mu = None if own else normal(4, 6, seed=1).to(lane.device)
    results = []
    for active in (lane.active, lambda: segops.use_backend("reference")):
        features = x.to(lane.device, copy=True).requires_grad_()
        with active():
            losses = segops.car_losses(features, y.to(lane.device), 4, centers=mu, mask_ignored_c2p=mask)
            (gradient,) = torch.autograd.grad(sum(losses), features)
        results.append((torch.stack(losses).detach(), gradient))
    (losses, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(losses, expected, equal_nan=True)
    known = gradient.isfinite()
    assert not (known & ~expected_gradient.isfinite()).any()
    torch.testing.assert_close(gradient[known], expected_gradient[known])
    assert bool(losses[0].isfinite()) == (label == 255)
    assert bool(known.all()) == (label == 255 and mask)
