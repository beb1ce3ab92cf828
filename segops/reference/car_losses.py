"""The pixel losses of CAR (class-aware regularisation): one pass over the features, the class centres constant.

    intra = sum over counted pixels and channels of |mu_y - x|
    E_k   = x . mu_k / sqrt(C), for the pixel's own class |mu_y|^2 / sqrt(C);  B = softmax_k E
    e     = sum over other classes of relu(B_k - threshold / (K - 1));  c2p = sum over pixels of clip(e, 1e-7, 1 - 1e-7)

An ignored pixel has no class of its own: all are foreign to it in c2p, unless it is masked. The sums of the features by
class pass through, so that their gradient meets the others where the features' gradient is written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._losses import check_labels, counted
from ._sample import Labels, Sample, Shape, Spec
from .class_centers import class_centers

__all__ = ["CLIP", "car_losses", "class_to_class", "sample_inputs"]

CLIP = 1e-7, 1 - 1e-7


def car_losses(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    sums: Tensor | None,
    ignore_index: int,
    c2p_threshold: float,
    mask_ignored_c2p: bool,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns intra [], c2p [], the class sums (or [0]), lse and inner.

    Centers and sums are [K, C] or [N, K, C]. For backward: lse [N, H, W], of E; and inner [N, H, W], the sum of the B_k
    that exceed the threshold, or -1 where c2p has no gradient.
    """
    n, c, h, w = features.shape
    classes = centers.shape[-2]
    if check:
        check_labels("car_losses", "labels", labels, classes, ignore_index)
    mu = centers.detach().expand(n, -1, -1)
    x = features.flatten(2).mT.to(mu.dtype)
    valid = counted(labels, classes, ignore_index).flatten(1)
    label = labels.long().flatten(1).where(valid, 0)
    own = mu.gather(1, label.unsqueeze(2).expand(-1, -1, c))
    counts = valid if mask_ignored_c2p else torch.ones_like(valid)
    x = x.masked_fill(~counts.unsqueeze(2), 0)  # or what is not finite there would have a gradient
    intra = (own - x).masked_fill(~valid.unsqueeze(2), 0).abs().sum()

    mine = F.one_hot(label, classes).bool() & valid.unsqueeze(2)
    energy = torch.where(mine, mu.square().sum(2).unsqueeze(1), x @ mu.mT) * c**-0.5
    share = energy.softmax(2)
    over = F.relu(share - c2p_threshold / (classes - 1)).masked_fill(mine, 0)
    excess = over.sum(2)
    c2p = (excess.clamp(*CLIP) * counts).sum()

    moves = counts & ~((excess < CLIP[0]) | (excess > CLIP[1]))
    inner = torch.where(moves, (share * (over > 0)).sum(2), -1).detach().view(n, h, w)
    lse = energy.logsumexp(2).detach().view(n, h, w)
    if sums is None:
        passed = mu.new_empty(0)
    else:
        passed, _ = class_centers(features, labels, classes, ignore_index, sums.dim() == 3, False)
    return intra, c2p, passed, lse, inner


def class_to_class(centers: Tensor, threshold: float) -> Tensor:
    """clip(e_i) of every centre [..., K, C] -> [..., K]; gradients flow into the centre that asks, not into the others.

    A = softmax_j(mu_i . sg(mu_j) / sqrt(C)),  e_i = sum over j != i of relu(A_ij - threshold / (K - 1))
    """
    classes, c = centers.shape[-2:]
    share = (centers @ centers.detach().mT * c**-0.5).softmax(-1)
    over = F.relu(share - threshold / (classes - 1))
    itself = torch.eye(classes, dtype=torch.bool, device=centers.device)
    return over.masked_fill(itself, 0).sum(-1).clamp(*CLIP)


def _sample(name: str, shape: Shape, labels: Labels, tiny: bool = True, given: bool = True, **kwargs) -> Sample:
    """Gradcheck cannot hold a gradient that leaves out the centres, so that tiny samples are given theirs."""
    shapes: dict[str, Spec] = {"features": shape, "labels": labels}
    if given:
        centers = (labels.classes, shape[1])
        shapes["centers"] = (shape[0], *centers) if kwargs.get("per_image") else centers
    kwargs = {"num_classes": labels.classes, **kwargs}
    return Sample(name, shapes, kwargs, tiny, differentiable=("features",))


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, larger labels, absent classes, thresholds, one past every vector and block."""
    uint8, int16, int32 = torch.uint8, torch.int16, torch.int32
    own = {"tiny": False, "given": False}
    return [
        _sample("one_pixel", (2, 3, 1, 1), Labels((2, 1, 1), 2, 0.0)),
        _sample("prime_sizes", (2, 5, 3, 7), Labels((2, 3, 7), 3, 0.2, uint8)),
        _sample("per_image", (2, 4, 5, 3), Labels((2, 5, 3), 4, 0.3, int16, -1), per_image=True, ignore_index=-1),
        _sample("larger_labels", (1, 6, 3, 4), Labels((1, 11, 13), 3, 0.2, int32), c2p_threshold=0.7),
        _sample("masked", (1, 4, 4, 5), Labels((1, 4, 5), 3, 0.4, ignore_index=1), ignore_index=1,
                mask_ignored_c2p=True),
        _sample("own_centers", (2, 5, 3, 7), Labels((2, 3, 7), 3, 0.2, uint8), **own),
        _sample("own_centers_per_image", (2, 6, 5, 4), Labels((2, 5, 4), 4, 0.2), **own, per_image=True,
                c2c_threshold=0.3, mask_ignored_c2p=True),
        _sample("nothing_counted", (1, 3, 2, 2), Labels((1, 4, 4), 3, 1.0), **own),
        _sample("absent_classes", (1, 33, 5, 7), Labels((1, 5, 7), 150, 0.1, uint8), **own),
        _sample("one_past_vectors", (1, 17, 3, 11), Labels((1, 3, 11), 17), **own),
        _sample("one_past_blocks", (1, 65, 5, 27), Labels((1, 9, 40), 33, 0.2, uint8), **own),
        _sample("many_classes", (1, 130, 6, 11), Labels((1, 6, 11), 300, 0.1, int16, -1), False, ignore_index=-1,
                c2p_threshold=1.5),
    ]  # fmt: skip
