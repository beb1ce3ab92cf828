"""segops.nn.CAR: the behaviours of the authors' code one by one, moving centres, and two ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import segops
from segops.nn import CAR
from segops.reference.car_losses import class_to_class

from .ranks import of_two_ranks


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(*rows):
    """Features [1, C, 1, P] from the pixels' features."""
    return torch.tensor(rows, dtype=torch.float64).t()[None, :, None, :].contiguous().requires_grad_()


def labels(*classes):
    return torch.tensor(classes)[None, None]


def excess(energy, own, threshold):
    """e of one pixel from its logits; ``own`` None is an ignored pixel."""
    share = torch.softmax(torch.as_tensor(energy, dtype=torch.float64), 0)
    over = torch.relu(share - threshold / (len(energy) - 1))
    return max(sum(float(value) for k, value in enumerate(over) if k != own), 1e-7)


def test_absent_classes_raise_the_mean_and_stand_in_every_softmax():
    """1: their centre is 0, their row of c2c uniform, their logit in c2p 0."""
    x = pixels([3.0, 1.0], [1.0, -1.0], [-1.0, 2.0])  # centres (2, 0) and (-1, 2) of classes 0 and 2
    intra, c2c, c2p = CAR(4)(x, labels(0, 0, 2))
    root = 2**0.5
    rows = [excess([4 / root, 0, -2 / root, 0], 0, 0.5), excess([-2 / root, 0, 5 / root, 0], 2, 0.5)]
    rows += 2 * [3 / 4 - 0.5]
    assert c2c.item() == pytest.approx((sum(rows) / 4) ** 2)
    shares = [excess([4 / root, 0, -3 / root, 0], 0, 0.25), excess([4 / root, 0, -3 / root, 0], 0, 0.25)]
    shares += [excess([-2 / root, 0, 5 / root, 0], 2, 0.25)]
    assert c2p.item() == pytest.approx((sum(shares) / 3) ** 2)
    assert intra.item() == pytest.approx((4 / 6) ** 2)


def test_ignored_pixels_take_part_in_c2p_only():
    """2: as if every class were foreign to them, unless they are masked."""
    x, y = pixels([1.0, 0.0], [0.0, 2.0], [4.0, 1.0]), labels(0, 1, 255)
    root = 2**0.5
    known = [excess([1 / root, 0], 0, 0.25), excess([0, 4 / root], 1, 0.25)]
    ignored = excess([4 / root, 2 / root], None, 0.25)
    found = CAR(2)(x, y)
    masked = CAR(2, mask_ignored_c2p=True)(x, y)
    assert found.c2p.item() == pytest.approx((sum([*known, ignored]) / 3) ** 2)
    assert masked.c2p.item() == pytest.approx((sum(known) / 2) ** 2)
    for losses, moves in ((found, True), (masked, False)):
        (gradient,) = torch.autograd.grad(losses.c2p, x, retain_graph=True)
        assert bool(gradient[..., 2].any()) == moves
    for loss in (found.intra, found.c2c):
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            assert not gradient[..., 2].any()
    # Intra's mean runs over the ignored pixel too.
    wide = CAR(2)(pixels([1.0, 0.0], [3.0, 4.0], [9.0, 9.0]), labels(0, 0, 255)).intra
    assert wide.item() == pytest.approx((6 / 6) ** 2)


def test_own_logit_in_c2p_is_constant():
    """3: it is |mu|^2, so that the gradient has no part along the own centre but what other centres share with it."""
    x = (normal(1, 3, 2, 3) / 4).requires_grad_()
    centers = torch.eye(3, dtype=torch.float64) * 2
    y = torch.tensor([[[0, 1, 2], [2, 1, 0]]])
    (gradient,) = torch.autograd.grad(segops.car_losses(x, y, 3, centers=centers, c2p_threshold=0.0).c2p, x)
    own = gradient.gather(1, y[:, None]).squeeze(1)
    assert not own.any()
    assert (gradient != 0).sum() == 12


@pytest.mark.parametrize(("threshold", "moves"), [(1.5, False), (1.0, False), (0.99, True)])
def test_threshold(threshold, moves):
    """4: the one other class has half of the softmax; up to a threshold of that nothing moves."""
    x = pixels([0.0, 0.0])
    centers = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=torch.float64)
    loss = segops.car_losses(x, labels(0), 2, centers=centers, c2p_threshold=threshold / 2).c2p
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool(gradient.any()) == moves
    assert loss.item() == pytest.approx(max(1e-7, 0.5 - threshold / 2) ** 2)


def test_losses_are_weighted():
    x, y = normal(2, 5, 4, 4), torch.randint(3, (2, 8, 8))
    plain = segops.car_losses(x, y, 3, c2c_threshold=0.4, c2p_threshold=0.3, per_image=True)
    weighted = CAR(3, weights=(2.0, 0.0, 0.5), c2c_threshold=0.4, c2p_threshold=0.3, per_image=True)(x, y)
    torch.testing.assert_close(torch.stack(weighted), torch.stack(plain) * torch.tensor([2.0, 0.0, 0.5]).double())


def test_moving_centres():
    x, y = normal(2, 5, 4, 6, dtype=torch.float32).requires_grad_(), torch.randint(3, (2, 4, 6))
    car = CAR(4, center_momentum=0.75, channels=5)
    before = car.centers.clone()
    assert set(car.state_dict()) == {"centers"}
    losses = car(x, y)
    mean, _ = segops.class_centers(x.detach(), y, 4)
    expected = before + 0.25 * (mean - before)
    expected[3] = before[3]  # the class is absent
    torch.testing.assert_close(car.centers, expected)
    torch.testing.assert_close(torch.stack(losses), torch.stack(segops.car_losses(x, y, 4, centers=expected)))
    assert not losses.c2c.requires_grad
    again = car(x, y)  # before the first one's backward
    (first,) = torch.autograd.grad(losses.intra + losses.c2p, x)
    given = segops.car_losses(x, y, 4, centers=expected)
    torch.testing.assert_close(first, torch.autograd.grad(given.intra + given.c2p, x)[0])
    sum(again).backward()

    moved = car.centers.clone()
    car.eval()(x, y)
    assert torch.equal(car.centers, moved)


def test_a_step_that_overflows_leaves_moving_centres_alone():
    x, y = normal(2, 5, 4, 6, dtype=torch.float32), torch.randint(3, (2, 4, 6))
    y[0, 0, 0] = 1
    car = CAR(3, center_momentum=0.5, channels=5)
    before = car.centers.clone()
    bad = x.clone()
    bad[0, 2, 0, 0] = torch.inf
    assert not car(bad, y).intra.isfinite()
    assert torch.equal(car.centers[1], before[1])
    assert not torch.equal(car.centers[0], before[0])
    assert all(loss.isfinite() for loss in car(x, y))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_moving_centres_in_half_precision_are_float32(cast):
    car = CAR(3, center_momentum=0.99, channels=5)
    before = car.centers.clone()
    getattr(car, cast)()
    assert car.centers.dtype == (torch.float64 if cast == "double" else torch.float32)
    torch.testing.assert_close(car.centers.float(), before, rtol=0, atol=0)
    if cast == "bfloat16":
        car(normal(2, 5, 4, 6, dtype=torch.bfloat16), torch.randint(3, (2, 4, 6)))
        assert (car.centers != before).all()


@pytest.mark.parametrize("assign", [False, True])
def test_moving_centres_are_float32_by_default_and_from_a_half_file(assign):
    try:
        torch.set_default_dtype(torch.bfloat16)
        car = CAR(3, center_momentum=0.99, channels=5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert car.centers.dtype == torch.float32
    half = {"centers": torch.ones(3, 5, dtype=torch.bfloat16)}
    car.load_state_dict(half, assign=assign)
    assert car.centers.dtype == torch.float32
    assert torch.equal(car.centers, half["centers"].float())


def test_moving_centres_move_twice_under_checkpointing():
    """As the docstring says."""
    x, y = normal(2, 5, 4, 6, dtype=torch.float32).requires_grad_(), torch.randint(3, (2, 4, 6))
    plain = CAR(3, center_momentum=0.75, channels=5)
    kept = copy.deepcopy(plain)
    (once,) = torch.autograd.grad(plain(x, y).c2p, x)
    (twice,) = torch.autograd.grad(checkpoint(kept, x, y, use_reentrant=False).c2p, x)
    assert not torch.allclose(once, twice)
    plain(x, y)
    torch.testing.assert_close(kept.centers, plain.centers)


def test_copy_shares_the_process_group():
    class Group:
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle 'ProcessGroup' object")

    car = CAR(3, sync=Group(), center_momentum=0.5, channels=4)
    copied = copy.deepcopy(nn.Sequential(car))[0]
    assert copied.sync is car.sync
    assert torch.equal(copied.centers, car.centers)
    assert copied.centers.data_ptr() != car.centers.data_ptr()


@pytest.mark.parametrize(("threshold", "moves"), [(1.0, False), (0.99, True)])
def test_threshold_between_classes(threshold, moves):
    """4: c2c of two zero centres, whose softmax is 1/2 each; exactly at the threshold nothing moves, e is clipped."""
    centers = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    loss = class_to_class(centers, threshold / 2)
    assert loss.tolist() == pytest.approx([max(1e-7, 0.5 - threshold / 2)] * 2)
    x = pixels([1.0, 0.0], [0.0, 0.0])
    c2c = CAR(2, c2c_threshold=threshold * 0.5)(x, labels(0, 1)).c2c
    (gradient,) = torch.autograd.grad(c2c, x)
    shares = [torch.softmax(torch.tensor([2**-0.5, 0.0]).double(), 0)[1], 0.5]
    assert c2c.item() == pytest.approx((sum(max(1e-7, float(s) - threshold / 2) for s in shares) / 2) ** 2)
    assert bool(gradient[..., 1].any()) == moves


def test_repr_and_wrong_arguments():
    assert repr(CAR(19)) == "CAR(19, weights=(1.0, 1.0, 1.0), per_image=False, sync='auto')"
    assert not CAR(19).state_dict()
    with pytest.raises(ValueError, match="CAR: num_classes must be at least 2"):
        CAR(1)
    with pytest.raises(ValueError, match="weights must be three numbers"):
        CAR(3, weights=(1.0, 1.0))
    with pytest.raises(TypeError, match="weights must be a number, got 'a'"):
        CAR(3, weights=("a", 1.0, 1.0))
    with pytest.raises(ValueError, match=r"c2c_threshold must be in \[0, 3\], got -1"):
        CAR(3, c2c_threshold=-1)
    with pytest.raises(ValueError, match="sync must be False, True, a process group or 'auto', got 'yes'"):
        CAR(3, sync="yes")
    with pytest.raises(ValueError, match="center_momentum needs channels"):
        CAR(3, center_momentum=0.9)
    with pytest.raises(ValueError, match=r"center_momentum must be in \[0, 1\]"):
        CAR(3, center_momentum=1.5, channels=4)
    with pytest.raises(ValueError, match="features must have 4 channels"):
        CAR(3, center_momentum=0.9, channels=4)(torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8))


# ---- two ranks ----

VARIANTS = {
    "batch": {},
    "image": {"per_image": True},
    "masked": {"mask_ignored_c2p": True, "weights": (0.5, 2.0, 1.5)},
    "moving": {"center_momentum": 0.9, "channels": 4},
}
IMAGES = (1, 2)  # of each rank


class Branch(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(3)
        self.project = nn.Conv2d(6, 4, 1).double()
        self.car = CAR(3, **settings)

    def forward(self, x, y):
        return torch.stack(self.car(self.project(x), y))


def data():
    x, y = 3 * normal(sum(IMAGES), 6, 5, 4, seed=7), torch.randint(3, (sum(IMAGES), 10, 9), generator=torch.Generator())
    y[0, :4] = 255
    y[0] = y[0].where(y[0] != 2, 1)  # absent on the first rank
    return x, y


def results_of(branch, x, y, ranks=1):
    """Losses, the gradients of parameters, the gradient of x of 1 / ranks of the loss, and the moving centres."""
    x.requires_grad_()
    losses = branch(x, y)
    (losses.sum()).backward()
    module = branch.module if ranks > 1 else branch
    parameters = [p.grad for p in module.parameters()]
    return [losses.detach(), *parameters, x.grad / ranks, *module.car.state_dict().values()]


def results_of_rank(index):
    mine = slice(sum(IMAGES[:index]), sum(IMAGES[: index + 1]))
    found = {}
    for name, settings in VARIANTS.items():
        x, y = data()
        branch = DistributedDataParallel(Branch(**settings), broadcast_buffers=False)
        found[name] = results_of(branch, x[mine], y[mine], ranks=2)
    x, y = data()
    part = x[mine].clone().requires_grad_()
    centers, counts = segops.class_centers(part, y[mine], 3, sync=True)
    centers.backward(normal(3, 6, seed=9))
    found["centers"] = [centers.detach(), counts, part.grad]
    losses = (
        segops.car_losses(x[mine], y[mine], 3, sync=False),
        segops.car_losses(x[mine], y[mine], 3, sync=dist.group.WORLD),
    )
    found["sync"] = [torch.stack(loss) for loss in losses]
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return of_two_ranks(results_of_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_are_one_process_with_both_batches(of_ranks, name):
    """5: DistributedDataParallel's mean of the gradients; each rank's share of the loss, summed, for the features."""
    x, y = data()
    losses, *rest = results_of(Branch(**VARIANTS[name]), x, y)
    for index, found in enumerate(of_ranks):
        mine = slice(sum(IMAGES[:index]), sum(IMAGES[: index + 1]))
        torch.testing.assert_close(found[name][0], losses)
        for i, (actual, expected) in enumerate(zip(found[name][1:], rest, strict=True)):
            torch.testing.assert_close(actual, expected[mine] if i == 2 else expected)


def test_class_centers_of_two_ranks(of_ranks):
    """Each rank's upstream gradient reaches every rank: summed, twice one process's."""
    x, y = data()
    centers, counts = segops.class_centers(x.requires_grad_(), y, 3)
    centers.backward(normal(3, 6, seed=9))
    for index, found in enumerate(of_ranks):
        mine = slice(sum(IMAGES[:index]), sum(IMAGES[: index + 1]))
        torch.testing.assert_close(found["centers"], [centers.detach(), counts, 2 * x.grad[mine]])


def test_without_sync_ranks_differ(of_ranks):
    x, y = data()
    for index, found in enumerate(of_ranks):
        mine = slice(sum(IMAGES[:index]), sum(IMAGES[: index + 1]))
        alone, together = found["sync"]
        torch.testing.assert_close(alone, torch.stack(segops.car_losses(x[mine], y[mine], 3)))
        torch.testing.assert_close(together, torch.stack(segops.car_losses(x, y, 3)))
