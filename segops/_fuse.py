"""Puts the fused operator into the MSCA modules of other libraries, in place and reversibly."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from .nn.mscan import MSCA
from .ops.msca import msca
from .testing import compare

__all__ = ["fuse", "unfuse"]


def fuse(model: nn.Module, *, verify: Any = None) -> int:
    """Makes the MSCA modules of other libraries (mmsegmentation's, the authors') run :func:`segops.msca`.

    An MSCA module has convolutions called ``conv0``, ``conv0_1``, ``conv0_2``, ... and ``conv3``, as
    :class:`segops.nn.MSCA` describes them, whatever its class. It is replaced if its own forward gives, in float64,
    what the operator gives. Its class becomes a subclass with another forward: parameters, their names, hooks, the
    optimizer and ``isinstance`` stay as they were, and :func:`unfuse` brings the old forward back.

    Args:
        model: Changed in place; may be an MSCA module itself.
        verify: Arguments of ``model``, a tensor or a tuple or dict of arguments: runs it on them before and after, with
            the same random numbers, and prints which modules were replaced, why the others were not, the largest
            difference of outputs and of gradients, milliseconds, and the MiB that autograd keeps for backward. Buffers,
            ``.grad`` and random state are left as they were.

    Returns:
        How many modules were replaced by this call.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> model = segops.nn.SegNeXt("t", 19)  # nothing to do: its modules call the operator already
        >>> segops.fuse(model)
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if _looks_like_msca(module)}
    reasons = {name: _why_not(module) for name, module in found.items()}
    before = None if verify is None else _measure(model, verify)
    for name, module in found.items():
        if reasons[name] is None:
            module.__class__ = _fused(type(module))
    if before is not None:
        print(_report(reasons, before, _measure(model, verify)))
    return sum(reason is None for reason in reasons.values())


def unfuse(model: nn.Module) -> int:
    """Gives the modules that :func:`fuse` changed their own forward back, and returns how many there were."""
    found = [module for module in model.modules() if isinstance(module, _Fused)]
    for module in found:
        module.__class__ = _own_class(type(module))
    return len(found)


def _forward(module: Any, x: Tensor) -> Tensor:
    conv0, strips, conv3 = _convolutions(module)
    taps = [(row.weight, row.bias, column.weight, column.bias) for row, column in strips]
    return msca(x, conv0.weight, conv0.bias, taps, conv3.weight, conv3.bias)


class _Fused:
    """What a replaced module's class has before its own."""

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (_own_class(type(self)),), self.__dict__


class _Trial(nn.Module):
    """A forward on a module, without its hooks."""

    def __init__(self, module: nn.Module, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.module, x)


_classes: dict[type, type] = {}


def _fused(cls: type) -> type:
    if cls not in _classes:
        _classes[cls] = type(f"Fused{cls.__name__}", (_Fused, cls), {"__doc__": cls.__doc__})
    return _classes[cls]


def _own_class(cls: type) -> type:
    return cls.__bases__[1]


def _rebuilt(cls: type) -> nn.Module:
    return object.__new__(_fused(cls))


def _convolutions(module: Any) -> tuple[Any, list[tuple[Any, Any]], Any]:
    strips, i = [], 0
    while hasattr(module, f"conv{i}_1"):
        strips.append((getattr(module, f"conv{i}_1"), getattr(module, f"conv{i}_2", None)))
        i += 1
    return module.conv0, strips, module.conv3


def _looks_like_msca(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return {"conv0", "conv0_1", "conv3"} <= children.keys() and not isinstance(module, (_Fused, MSCA))


def _why_not(module: nn.Module) -> str | None:
    """None, or why the module is left alone."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if "forward" in vars(module):
        return "its forward was set on the instance"
    conv0, strips, conv3 = _convolutions(module)
    named = {"conv0": conv0, "conv3": conv3}
    for i, (row, column) in enumerate(strips):
        named |= {f"conv{i}_1": row, f"conv{i}_2": column}
    for name, conv in named.items():
        reason = _conv_why_not(conv, None if name == "conv3" else name)
        if reason is not None:
            return f"{name} {reason}"
    parameters = {f"module.{name}": p.detach().double() for name, p in module.named_parameters()}
    device = conv0.weight.device
    if device.type == "meta":
        return "its parameters are on the meta device"
    x = torch.randn(1, conv0.in_channels, 9, 11, generator=torch.Generator().manual_seed(0)).to(device).double()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            own, fused = (
                functional_call(_Trial(module, f), parameters, (x,)) for f in (type(module).forward, _forward)
            )
    except Exception as error:
        return f"its forward cannot be tried: {type(error).__name__}: {str(error).splitlines()[0]}"
    if not isinstance(own, Tensor):
        return f"its forward returns a {type(own).__name__}"
    return "its forward computes something else" if compare("out", own, fused).failure else None


def _conv_why_not(conv: Any, depthwise: str | None) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__name__}, not a plain Conv2d"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "has hooks, which would not run"
    height, width = conv.kernel_size
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"has stride {conv.stride} and dilation {conv.dilation}, expected 1"
    if conv.in_channels != conv.out_channels or conv.groups != (conv.in_channels if depthwise else 1):
        return f"has {conv.in_channels} to {conv.out_channels} channels in {conv.groups} groups"
    if height % 2 == 0 or width % 2 == 0:
        return f"has an even kernel {conv.kernel_size}"
    if conv.padding_mode != "zeros" or conv.padding not in ("same", (height // 2, width // 2)):
        return f"has padding {conv.padding} ({conv.padding_mode}), expected zeros that keep the size"
    if depthwise is None and conv.kernel_size != (1, 1):
        return f"has kernel {conv.kernel_size}, expected (1, 1)"
    return None


@dataclass
class _Run:
    """Outputs and gradients by name, milliseconds of forward and backward, bytes kept for backward."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    milliseconds: float
    kept: int


def _measure(model: nn.Module, batch: Any, rounds: int = 3) -> _Run:
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {}) if isinstance(batch, tuple) else (
        (batch,), {},
    )  # fmt: skip
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    best, kept = float("inf"), 0
    outputs: list[Tensor] = []
    gradients: Sequence[Tensor | None] = ()
    for _ in range(rounds):
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            _wait(devices)
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                leaves = tree_leaves(model(*args, **kwargs))
            outputs = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
            ends = [x for x in outputs if x.requires_grad]
            kept = sum(storages.values())
            if ends and wanted:
                weights = [torch.randn_like(x) for x in ends]
                gradients = torch.autograd.grad(ends, list(wanted.values()), weights, allow_unused=True)
            _wait(devices)
            best = min(best, time.perf_counter() - start)
        for buffer, value in buffers:
            buffer.copy_(value)
    by_name = {name: g for name, g in zip(wanted, gradients, strict=False) if g is not None}
    return _Run({str(i): x.detach() for i, x in enumerate(outputs)}, by_name, 1e3 * best, kept)


def _wait(devices: Sequence[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def _report(reasons: Mapping[str, str | None], before: _Run, after: _Run) -> str:
    replaced = [name for name, reason in reasons.items() if reason is None]
    lines = [f"segops.fuse replaced {len(replaced)} of {len(reasons)} MSCA modules"]
    lines += [f"  replaced  {name or 'the model itself'}" for name in replaced]
    lines += [f"  left      {name or 'the model itself'}: {reason}" for name, reason in reasons.items() if reason]
    for what, old, new in (
        ("outputs", before.outputs, after.outputs),
        ("gradients", before.gradients, after.gradients),
    ):
        differences = {name: float((new[name] - x).abs().max()) if x.numel() else 0.0 for name, x in old.items()}
        if differences:
            worst = max(differences, key=lambda name: differences[name])
            at = f" in {worst}" if what == "gradients" else ""
            lines.append(f"  largest difference of {what}: {differences[worst]:.2g} of "
                         f"{float(old[worst].abs().max()):.2g}{at}")  # fmt: skip
    mib = 2**20
    lines.append(f"  {'':24}{'before':>10}{'after':>10}{'saved':>10}")
    for what, old_value, new_value in (
        ("ms per forward, backward", before.milliseconds, after.milliseconds),
        ("MiB kept for backward", before.kept / mib, after.kept / mib),
    ):
        lines.append(f"  {what:24}{old_value:10.1f}{new_value:10.1f}{old_value - new_value:10.1f}")
    return "\n".join(lines)
