"""Laws of nmf2d."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import segops

from .lanes import every_lane


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bases_of(*shape, seed=1, dtype=torch.float64):
    return F.normalize(uniform(*shape, seed=seed, dtype=dtype), dim=-2)


@every_lane
def test_the_residual_never_grows(lane):
    x, bases = uniform(1, 9, 6, 7).to(lane.device), bases_of(9, 3).to(lane.device)
    with lane.active():
        residuals = [(segops.nmf2d(x, bases, steps=steps, eps=1e-12) - x).norm() for steps in range(8)]
    assert all(later <= earlier for earlier, later in pairwise(residuals))
    assert residuals[-1] < 0.9 * residuals[0]


@every_lane
def test_a_map_of_rank_one_comes_back(lane):
    x = (uniform(2, 7, 1, 1) * uniform(2, 1, 5, 6, seed=3)).to(lane.device)
    with lane.active():
        torch.testing.assert_close(segops.nmf2d(x, bases_of(7, 1).to(lane.device), steps=2, eps=1e-9), x)


@every_lane
def test_zeros_stay_zeros_and_have_finite_gradients(lane):
    x = uniform(1, 6, 5, 5).to(lane.device)
    x[..., 2, :] = 0
    x[:, 3] = 0
    x.requires_grad_()
    with lane.active():
        out = segops.nmf2d(x, bases_of(6, 4).to(lane.device), steps=3)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert not out[..., 2, :].any()
    assert not out[:, 3].any()
    assert (out >= 0).all()
    assert gradient.isfinite().all()


@every_lane
@pytest.mark.parametrize("steps", [0, 3])
def test_one_step_gradient_is_that_of_the_last_update(lane, steps):
    x, bases = uniform(2, 6, 4, 5).to(lane.device).requires_grad_(), bases_of(2, 6, 3).to(lane.device)
    weights = uniform(2, 6, 4, 5, seed=9).to(lane.device)
    v, b = x.detach().flatten(2), bases
    c = (v.mT @ b).softmax(2)
    for _ in range(steps):
        c = c * (v.mT @ b) / (c @ b.mT @ b + 1e-6)
        b = b * (v @ c) / (b @ c.mT @ c + 1e-6)
    last = b @ (c * (x.flatten(2).mT @ b) / (c @ b.mT @ b + 1e-6)).mT
    (expected,) = torch.autograd.grad(last.view_as(x), x, weights)
    given = bases.clone().requires_grad_()
    with lane.active():
        out = segops.nmf2d(x, given, steps=steps, grad="one_step")
        gradient, of_bases = torch.autograd.grad(out, (x, given), weights, allow_unused=True)
        unrolled = segops.nmf2d(x, bases, steps=steps)
    torch.testing.assert_close(gradient, expected)
    assert of_bases is None
    torch.testing.assert_close(out, unrolled)


@every_lane
def test_eps_of_float64_is_float64(lane):
    generator = torch.Generator().manual_seed(0)
    x, bases = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((1, 3, 2, 5), (3, 2)))
    x, bases = x.to(lane.device).requires_grad_(), bases.to(lane.device)
    results = []
    for backend in (lane.active(), segops.use_backend("reference")):
        with backend:
            out = segops.nmf2d(x, bases, steps=1, eps=0.3)
            results.append((out, *torch.autograd.grad(out.sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every_lane
def test_images_do_not_see_each_other(lane):
    x, bases = uniform(3, 8, 11, 10).to(lane.device), bases_of(8, 5).to(lane.device)
    with lane.active():
        whole = segops.nmf2d(x, bases)
        for i in range(3):
            torch.testing.assert_close(segops.nmf2d(x[i : i + 1], bases), whole[i : i + 1])
        torch.testing.assert_close(segops.nmf2d(x, bases.expand(3, -1, -1).contiguous()), whole)


@every_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_in_float32(lane, dtype):
    x, bases = uniform(1, 16, 7, 9).to(lane.device, dtype), bases_of(16, 4, dtype=torch.float32).to(lane.device)
    with lane.active():
        out = segops.nmf2d(x, bases)
        wide = segops.nmf2d(x.float(), bases)
    assert out.dtype == dtype
    assert torch.equal(out, wide.to(dtype))


def test_drawn_bases():
    x = uniform(2, 8, 5, 6, dtype=torch.float32)
    draws = [segops.nmf2d(x, rank=3, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    bases = F.normalize(torch.rand(2, 8, 3, generator=torch.Generator().manual_seed(4)), dim=1)
    assert torch.equal(draws[0], segops.nmf2d(x, bases))
    assert not torch.equal(segops.nmf2d(x), segops.nmf2d(x))
    torch.manual_seed(4)
    assert torch.equal(segops.nmf2d(x, rank=3), draws[0])


def kept_for_backward(function, inputs):
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


@pytest.mark.parametrize("grad", ["unrolled", "one_step"])
def test_what_is_kept_for_backward(grad):
    x, bases = uniform(1, 32, 24, 20, dtype=torch.float32).requires_grad_(), bases_of(32, 8, dtype=torch.float32)
    kept = {}
    for backend in (None, "reference"):
        with segops.use_backend(backend):
            kept[backend] = kept_for_backward(lambda: segops.nmf2d(x, bases, grad=grad), (x, bases))
    updates = (8 * 24 * 20 + 6 * 32, 24 * 20 + 32)[grad == "one_step"]
    assert kept[None] == 4 * 8 * updates
    assert kept[None] * (2 if grad == "unrolled" else 1) <= kept["reference"]
    with torch.no_grad():
        assert kept_for_backward(lambda: segops.nmf2d(x, bases), (x, bases)) == 0


@pytest.mark.parametrize("grad", ["unrolled", "one_step"])
@pytest.mark.parametrize("for_bases", [False, True], ids=["x", "x and bases"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_flops_are_those_of_eager_pytorch(steps, for_bases, grad):
    x, bases = uniform(2, 12, 5, 7).requires_grad_(), bases_of(2, 12, 3).requires_grad_(for_bases)
    counts = []
    for backend in (None, "reference"):
        with segops.use_backend(backend), FlopCounterMode(display=False) as counter:
            segops.nmf2d(x, bases, steps=steps, grad=grad).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"x": torch.zeros(1, 4, 3, 3, dtype=torch.int32)}, TypeError, "x must have a floating-point dtype"),
        ({"x": torch.zeros(1, 4, 0, 3)}, ValueError, "x must have C, H, W >= 1"),
        ({"bases": torch.zeros(5, 2)}, ValueError, r"bases must be \[4, R\] or \[1, 4, R\], got \(5, 2\)"),
        ({"bases": torch.zeros(2, 4, 2)}, ValueError, r"bases must be \[4, R\] or \[1, 4, R\], got \(2, 4, 2\)"),
        ({"bases": torch.zeros(4, 0)}, ValueError, r"bases must be \[4, R\]"),
        ({"bases": [1.0]}, TypeError, r"bases must be a tensor \[4, R\], got list"),
        ({"bases": torch.zeros(4)}, ValueError, r"bases must be \[4, R\], got 1 axes"),
        ({"bases": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "bases must have a floating-point dtype"),
        ({"bases": None, "rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps must be an int"),
        ({"grad": "none"}, ValueError, "grad must be one of 'unrolled', 'one_step', got 'none'"),
        ({"eps": -1.0}, ValueError, r"eps must be in \[0, 1\], got -1"),
        ({"generator": torch.Generator()}, ValueError, "generator draws bases, and bases are given"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        segops.nmf2d(**{"x": torch.rand(1, 4, 3, 3), "bases": torch.rand(4, 2), **change})
