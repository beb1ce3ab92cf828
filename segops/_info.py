"""What is installed, which backends can run, and why the others cannot."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import _dispatch, _native


def info() -> str:
    """Versions, compiled modules, and the op x backend table with a reason for every backend that cannot run here.

    The same text as ``python -m segops info``.
    """
    lines = [f"segops {_version('segops')}   torch {torch.__version__}   triton {_version('triton')}   "
             f"Python {platform.python_version()}   {platform.machine()}"]  # fmt: skip
    for module in _native.MODULES:
        reason = _native.why_not(module)
        note = f" (instruction set {_native.cpu_isa()})" if module == "_C" and reason is None else ""
        lines.append(f"  segops.{module}: {'loaded' + note if reason is None else reason}")
    forced = _dispatch._state.backend
    lines.append(f"  backend: {'automatic' if forced is None else forced + ' (by name)'}")
    for op in _dispatch.OPS.values():
        lines.append(op.name)
        for device, rows in op.backends.items():
            for row in rows:
                reason = row.available()
                state = "only by name" if reason is None and row.by_name_only else reason or "ready"
                lines.append(f"  {device:5} {row.name:18} {state}")
        lines.append(f"  {'any':5} {'reference':18} ready")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
