"""One call as it is timed, checked and weighed: inputs in a layout, forward alone or with the backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from _suite import FORWARD, LAYOUTS, Function, Rival, Row, Suite
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import segops
from segops import _native
from segops.reference._sample import Inputs, Sample

Call = Callable[[], tuple[Tensor, ...]]


def inputs(sample: Sample, dtype: torch.dtype, device: str, layout: str) -> Inputs:
    """The sample's tensors; maps take the layout, anything that is not 4-D keeps its own."""
    tensors = sample.tensors(dtype, device)

    def laid_out(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=LAYOUTS[layout]) if x.ndim == 4 else x

    return tree_map_only(Tensor, laid_out, tensors)


def call(
    function: Function,
    sample: Sample,
    tensors: Inputs,
    direction: str,
    kwargs: dict | None = None,
    rounded: torch.dtype | None = None,
) -> Call:
    """A call without arguments that returns (out,) or (out, gradient of each differentiable tensor).

    The upstream gradient is the same numbers for every dtype, rounded to ``rounded`` (the output's dtype if None);
    that of a loss is 1.
    """
    kwargs = kwargs or {}
    if direction == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(**tensors, **kwargs),)

        return forward
    wanted = gradients(sample)
    tensors = tensors | {
        name: tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), tensors[name]) for name in wanted
    }
    leaves = [x for name in wanted for x in tree_leaves(tensors[name]) if x is not None]
    upstream: list[Tensor] = []  # drawn at the first call, when the shape of the output is known

    def training() -> tuple[Tensor, ...]:
        out = function(**tensors, **kwargs)
        if not upstream and out.ndim == 0:
            upstream.append(torch.ones_like(out))
        elif not upstream:
            generator = torch.Generator().manual_seed(1)
            drawn = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            drawn = drawn.to(out.device, rounded or out.dtype)
            upstream.append(torch.empty_like(out).copy_(drawn))
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    return training


def gradients(sample: Sample) -> list[str]:
    """The tensors that a training step differentiates."""
    return [name for name in sample.shapes if sample.differentiable is None or name in sample.differentiable]


def gradient_names(sample: Sample) -> list[str]:
    """The same, those in lists by number."""
    found = []
    for name in gradients(sample):
        specs = tree_leaves(sample.shapes[name], is_leaf=lambda spec: isinstance(spec, tuple))
        present = [spec for spec in specs if spec is not None]
        found += [name] if len(present) == 1 else [f"{name}_{i}" for i in range(len(present))]
    return found


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
    tensors = inputs(sample, row.dtype, row.device, row.layout)
    return call(suite.function, sample, tensors, row.direction, sample.kwargs)


def theirs(rival: Rival, layout: str, row: Row, sample: Sample | None = None) -> Call:
    sample = sample or row.sample
    function = rival.prepare(sample, row.dtype, row.device, row.direction)
    return call(function, sample, inputs(sample, row.dtype, row.device, layout), row.direction)
