"""Non-negative matrix factorisation of a feature map (Hamburger, SegNeXt 3.2): X [C, n] ~ B C^T with n = H W.

    C_0     = softmax_R(X^T B_0)
    C_{t+1} = C_t * (X^T B_t) / (C_t (B_t^T B_t) + eps)
    B_{t+1} = B_t * (X C_{t+1}) / (B_t (C_{t+1}^T C_{t+1}) + eps)         t = 0 .. steps - 1, coefficients first
    out     = B C^T after one more update of the coefficients

``grad="unrolled"`` differentiates all of it; ``"one_step"`` the last update of the coefficients and out, with B and the
coefficients before that update as constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._sample import Sample, Uniform

__all__ = ["nmf2d", "sample_inputs"]


def nmf2d(
    x: Tensor, bases: Tensor, steps: int, grad: str, eps: float, training: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [N, C, H, W]; and what the iterations went through, or two [0] unless ``training``.

    Unrolled: C_0 .. C_{steps + 1} [N, steps + 2, n, R] and B_1 .. B_steps [N, steps, C, R]. One step: C before its last
    update [N, 1, n, R], and B [N, 1, C, R]. Both are in the dtype of bases and have no gradient.
    """
    v = x.flatten(2).to(bases.dtype)
    b = bases
    coefficients, history = [], []
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad == "unrolled"):
        c = (v.mT @ b).softmax(2)
        coefficients.append(c)
        for _ in range(steps):
            c = c * (v.mT @ b) / (c @ (b.mT @ b) + eps)
            b = b * (v @ c) / (b @ (c.mT @ c) + eps)
            coefficients.append(c)
            history.append(b)
        weight = c / (c @ (b.mT @ b) + eps)
    if grad == "one_step":
        b, weight = b.detach(), weight.detach()  # no_grad does not hold in forward mode
        coefficients, history = [c], [b]
    c = weight * (v.mT @ b)
    if grad == "unrolled":
        coefficients.append(c)
    out = (b @ c.mT).view(x.shape).to(x.dtype)
    if not training:
        return out, b.new_empty(0), b.new_empty(0)
    stacked = torch.stack(history, 1) if history else b.new_empty(b.shape[0], 0, *b.shape[1:])
    return out, torch.stack(coefficients, 1).detach(), stacked.detach()


def _sample(name: str, shape: tuple[int, int, int, int], rank: int, *, per_image: bool = False, **kwargs) -> Sample:
    tiny = kwargs.pop("tiny", False)
    n, c, _, _ = shape
    # Columns of about unit length.
    bases = Uniform((n, c, rank) if per_image else (c, rank), 0.2 * c**-0.5, 1.6 * c**-0.5)
    constant = kwargs.get("grad") == "one_step"
    differentiable = ("x",) if constant else None
    return Sample(name, {"x": Uniform(shape, 0.0, 2.0), "bases": bases}, kwargs, tiny, differentiable=differentiable)


def sample_inputs() -> list[Sample]:
    """Edges first: one pixel, primes, more bases than channels or pixels, one past every vector and block.

    One-step samples are not ``tiny``: gradcheck cannot hold a gradient that leaves out most of the function.
    """
    return [
        _sample("one_pixel", (2, 3, 1, 1), 2, steps=2, eps=0.3, tiny=True),
        _sample("prime_sizes", (2, 5, 3, 7), 3, steps=3, tiny=True),
        _sample("per_image", (2, 6, 5, 4), 2, steps=1, eps=1e-3, per_image=True, tiny=True),
        _sample("more_bases_than_pixels", (1, 3, 2, 3), 7, steps=1, eps=0.3, tiny=True),
        _sample("no_step", (1, 4, 3, 5), 3, steps=0, tiny=True),
        _sample("one_past_vectors", (1, 34, 9, 15), 17, steps=4, per_image=True),
        _sample("one_past_blocks", (1, 33, 5, 103), 65, steps=2),
        _sample("light_ham", (2, 64, 16, 15), 16, steps=6),
        _sample("one_step", (2, 13, 7, 9), 5, steps=3, grad="one_step", per_image=True),
        _sample("one_step_ham", (1, 48, 12, 17), 32, steps=6, grad="one_step"),
    ]
