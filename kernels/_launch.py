"""One kernel launch as data, so that what runs and what is compiled ahead of time for an audit cannot differ.

A launcher in ``kernels/X.py`` builds ``Launch`` objects from tensors and runs them; its ``aot_cases()`` builds the same
objects from meta tensors and gives them names. ``Launch.compile`` needs no GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["TARGETS", "Launch", "aot_cases"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
_POINTER |= {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"}


@dataclass(frozen=True)
class Launch:
    """A ``triton.jit`` function with its arguments, all by name, and its compile options.

    Attributes:
        kernel: The jit function.
        grid: Programs along the three grid axes; only the first may exceed 65535.
        args: Every argument, constexprs included: tensors, ints, None, and tuples of these; floats only
            as constexprs.
        num_warps: Threads per program / 32; a wavefront of 64 counts as two.
        num_stages: Depth of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        tensor = next(arg for arg in self.args.values() if isinstance(arg, torch.Tensor))
        # Triton launches on the current device, whichever device the tensors are on.
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            self.kernel[self.grid](**self.args, **self.options(64 if torch.version.hip else 32))

    def signature(self) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
        """Types, constants and divisibility, specialised on 1 and on multiples of 16 as a launch would."""
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def kind(value: Any, path: tuple[int, ...], constexpr: bool) -> Any:
            if isinstance(value, tuple) and not constexpr:
                return tuple(kind(item, (*path, i), False) for i, item in enumerate(value))
            if constexpr or value is None or (isinstance(value, int) and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, float):
                name = self.kernel.params[path[0]].name
                raise TypeError(f"{name} must be a constexpr: Triton passes a float as float32, beside float64 too")
            tensor = isinstance(value, torch.Tensor)
            if (value.data_ptr() if tensor else value) % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            if tensor:
                return _POINTER[value.dtype]
            return "i32" if -(2**31) <= value < 2**31 else "i64"

        params = self.kernel.params
        types = {p.name: kind(self.args[p.name], (i,), p.is_constexpr) for i, p in enumerate(params)}
        return types, constants, attributes

    def compile(self, target: str) -> Any:
        """Triton's compiled kernel for one of ``TARGETS``: ``.asm``, ``.metadata``."""
        types, constants, attributes = self.signature()
        source = ASTSource(self.kernel, types, constants, attributes)
        return triton.compile(source, target=TARGETS[target], options=self.options(TARGETS[target].warp_size))

    def options(self, warp_size: int) -> dict[str, int]:
        return {"num_warps": max(self.num_warps * 32 // warp_size, 1), "num_stages": self.num_stages}


def aot_cases() -> list[tuple[str, Launch]]:
    """The named shipped configurations of every operator's file in this package."""
    package = importlib.import_module(__package__)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return [case for module in modules for case in module.aot_cases()]
