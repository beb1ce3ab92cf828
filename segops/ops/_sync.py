"""Sums over the ranks of a process group, differentiably. A process group cannot enter an op."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_sync", "sum_over_ranks", "total_over_ranks"]


def check_sync(function: str, sync: Any) -> Any:
    """None, or the process group to sum over."""
    if sync is False:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{function}: sync needs torch.distributed.init_process_group, or must be False; got {sync!r}")
    if sync is True:
        return dist.group.WORLD
    if not isinstance(sync, dist.ProcessGroup):
        raise TypeError(f"{function}: sync must be False, True or a torch.distributed.ProcessGroup, got {sync!r}")
    return sync


def total_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum, without a gradient; x where there is no group."""
    if group is None:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def sum_over_ranks(x: Tensor, group: Any, total: Tensor | None = None) -> Tensor:
    """The sum; its gradient is the sum of the gradients on all ranks. ``total`` is the sum, where it is known."""
    if group is None:
        return x
    return _SumOverRanks.apply(x, total_over_ranks(x, group) if total is None else total, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_over_ranks(grad, ctx.group), None, None
