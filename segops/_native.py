"""Loads the compiled modules beside this file, and keeps the reason when one does not load."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
from pathlib import Path

import torch

MODULES = ("_C", "_C_cuda", "_labels")
CPU_ISAS = ("base", "avx2", "avx512")

_MINIMUM_TORCH = (2, 11)
_reasons: dict[str, str | None] = {}


def why_not(module: str) -> str | None:
    """None when ``module`` is loaded, else one sentence that says why it is not."""
    return _reasons[module]


def has(op: str, key: str) -> bool:
    """Whether a compiled ``op`` ("namespace::name") was loaded for a dispatch key."""
    namespace, name = op.split("::")
    return hasattr(getattr(torch.ops, namespace), name) and torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


def cpu_isa(cap: str | None = None) -> str:
    """The instruction set the CPU kernels run with; ``cap`` first sets the highest one allowed.

    Raises:
        ValueError: ``cap`` is not one of ``CPU_ISAS``.
        RuntimeError: the CPU kernels are not loaded.
    """
    if cap is not None and cap not in CPU_ISAS:
        raise ValueError(f"cpu_isa: expected one of {', '.join(CPU_ISAS)}, got {cap!r}")
    if _reasons["_C"] is not None:
        raise RuntimeError(f"cpu_isa: {_reasons['_C']}")
    return CPU_ISAS[torch.ops.segops_C.cpu_isa(-1 if cap is None else CPU_ISAS.index(cap))]


def _load(module: str) -> str | None:
    folder = Path(__file__).parent
    found = [folder / (module + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = [path for path in found if path.exists()]
    if not found:
        return f"segops.{module} was not built"
    if module == "_labels":  # pybind11 and numpy, any torch
        try:
            importlib.import_module("segops._labels")
        except ImportError as error:
            return f"segops._labels did not load: {error}"
        return None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _MINIMUM_TORCH:
        return f"segops.{module} needs torch >= 2.11, found {torch.__version__}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"segops.{module} did not load: {error}"
    return None


for _module in MODULES:
    _reasons[_module] = _load(_module)
if _reasons["_C"] is None and "SEGOPS_CPU_ISA" in os.environ:
    cpu_isa(os.environ["SEGOPS_CPU_ISA"])
