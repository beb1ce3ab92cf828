"""What surrounds a call: autocast, forward-mode AD and the transforms of torch.func.

Dynamo can trace no look into the levels of torch.func: while it compiles, each of its transforms counts as one that
differentiates, and forward-mode AD as one of every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["autocasts", "has_tangent", "levels", "only_reference", "wants_gradient"]

_functorch = torch._C._functorch


def autocasts(device: str) -> bool:
    """Whether autocast is on; a device that has none, such as meta, is no error."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def levels(x: Tensor) -> Iterator[Tensor]:
    """x as every transform of torch.func sees it, the innermost first."""
    yield x
    if torch.compiler.is_compiling():
        return
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward will read what an op may keep for it; a gradient may be wanted outside vmap."""
    if not torch.is_grad_enabled():
        return False
    if any(x is not None and x.requires_grad for x in tensors):
        return True
    return torch._C._are_functorch_transforms_active() and any(
        level.requires_grad for x in tensors if x is not None for level in levels(x)
    )


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        yield from (x for x in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(x, Tensor))


def has_tangent(args: Sequence[Any]) -> bool:
    """Of the arguments of an op, tensors or lists of them."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():
        return True
    # vmap has no rule for unpack_dual
    maps = (level for x in _tensors(args) for level in levels(x) if not _functorch.is_batchedtensor(level))
    return any(forward_ad.unpack_dual(level).tangent is not None for level in maps)


def only_reference(args: Sequence[Any]) -> str | None:
    """Why no backend may run: a custom op has neither forward-mode AD nor torch.func.grad."""
    if has_tangent(args):
        return 'forward-mode AD differentiates the reference only: use_backend("reference")'
    if torch._C._are_functorch_transforms_active() and (torch.compiler.is_compiling() or _functional_gradient(args)):
        return 'torch.func differentiates the reference only: use_backend("reference")'
    return None


def _functional_gradient(args: Sequence[Any]) -> bool:
    stack = _functorch.get_interpreter_stack() or ()
    return any(level.key() != _functorch.TransformType.Vmap for level in stack) and any(
        level.requires_grad for x in _tensors(args) for level in levels(x)
    )
