"""Derivatives through the reference: what a backward op means, and what its own derivatives are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import Op

__all__ = ["differentiate_through_reference", "pull_back"]


def pull_back(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of ``function(*inputs)`` weighted by ``grads``; [0] for an absent input.

    In grad mode they are differentiable.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            None if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs
        ]
        outputs = function(*leaves)
        kept = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [x for x in leaves if x is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in kept], wanted, [g for _, g in kept], create_graph=create_graph, materialize_grads=True
            )
        )
        return tuple(wanted[0].new_empty(0) if x is None else next(found) for x in leaves)


def differentiate_through_reference(op: Op, differentiable: Sequence[str], saved: Sequence[str] = ()) -> None:
    """Gives a backward op its own backward: that of its reference, recomputed.

    Args:
        op: The backward op.
        differentiable: Its arguments that have a gradient.
        saved: Its arguments that are outputs of the forward op, which the reference does not read.
    """
    op.differentiates = True
    wanted = [op.arguments.index(name) for name in differentiable]
    unread = {op.arguments.index(name) for name in saved}

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and i not in unread]
        ctx.save_for_backward(*(inputs[i] for i in tensors))
        ctx.tensors = tensors
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        gradients: list[Tensor | None] = [None] * len(args)
        grads = grads[0] if len(grads) == 1 and isinstance(grads[0], (list, tuple)) else grads
        if all(g is None for g in grads):
            return tuple(gradients)
        with torch.enable_grad():
            for i, x in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                args[i] = x.detach().requires_grad_() if i in wanted else x
            first = op.reference(*args)
            first = first if isinstance(first, tuple) else (first,)
            used = [(f, g) for f, g in zip(first, grads, strict=True) if g is not None and f.requires_grad]
            present = [i for i in wanted if args[i] is not None]
            second = torch.autograd.grad(
                [f for f, _ in used], [args[i] for i in present], [g for _, g in used], allow_unused=True
            )
        for i, gradient in zip(present, second, strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    op.register_autograd(backward, setup)
