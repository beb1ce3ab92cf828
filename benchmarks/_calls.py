"""One call as it is timed, checked and weighed: inputs in a layout, forward alone or with the backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from _suite import FORWARD, LAYOUTS, Function, Rival, Row, Suite
from torch import Tensor

import segops
from segops import _native
from segops.reference._sample import Sample

Call = Callable[[], tuple[Tensor, ...]]


def inputs(sample: Sample, dtype: torch.dtype, device: str, layout: str) -> dict[str, Tensor]:
    """The sample's tensors; maps take the layout, anything that is not 4-D keeps its own."""
    tensors = sample.tensors(dtype, device)
    format_ = LAYOUTS[layout]
    return {name: x.contiguous(memory_format=format_) if x.ndim == 4 else x for name, x in tensors.items()}


def call(
    function: Function,
    tensors: dict[str, Tensor],
    direction: str,
    kwargs: dict | None = None,
    rounded: torch.dtype | None = None,
) -> Call:
    """A call without arguments that returns (out,) or (out, gradient of each tensor).

    The upstream gradient is the same numbers for every dtype, rounded to ``rounded`` (the output's dtype if None).
    """
    kwargs = kwargs or {}
    if direction == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*tensors.values(), **kwargs),)

        return forward
    leaves = [x.detach().requires_grad_() for x in tensors.values()]
    upstream: list[Tensor] = []  # drawn at the first call, when the shape of the output is known

    def training() -> tuple[Tensor, ...]:
        out = function(*leaves, **kwargs)
        if not upstream:
            generator = torch.Generator().manual_seed(1)
            drawn = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            drawn = drawn.to(out.device, rounded or out.dtype)
            upstream.append(torch.empty_like(out).copy_(drawn))
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    return training


@contextlib.contextmanager
def chosen(row: Row):
    """The backend and the instruction set that the row asks for."""
    with segops.use_backend(row.backend) if row.backend else contextlib.nullcontext():
        if row.isa is None:
            yield
            return
        before = _native.cpu_isa()
        if _native.cpu_isa(row.isa) != row.isa:
            _native.cpu_isa(before)
            raise RuntimeError(f"this machine has no {row.isa}")
        try:
            yield
        finally:
            _native.cpu_isa(before)


def ours(suite: Suite, row: Row, sample: Sample | None = None) -> Call:
    sample = sample or row.sample
    return call(suite.function, inputs(sample, row.dtype, row.device, row.layout), row.direction, sample.kwargs)


def theirs(rival: Rival, layout: str, row: Row, sample: Sample | None = None) -> Call:
    sample = sample or row.sample
    function = rival.prepare(sample, row.dtype, row.device, row.direction)
    return call(function, inputs(sample, row.dtype, row.device, layout), row.direction)
