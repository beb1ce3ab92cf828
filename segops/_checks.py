"""Argument checks of the public functions: each error names the argument, what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _context


def tensor(function: str, name: str, value: Any, layout: str) -> None:
    """``layout`` is the expected shape in words of its axes, such as "[N, C, H, W]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor {layout}, got {type(value).__name__}")
    axes = layout.count(",") + 1
    if value.dim() != axes:
        raise ValueError(f"{function}: {name} must be {layout}, got {value.dim()} axes: {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{function}: {name} must have a floating-point dtype, got {value.dtype}")


def labels(function: str, name: str, value: Any, layout: str | None = None) -> None:
    """A label map; ``layout`` as in :func:`tensor`, None for any shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor of labels, got {type(value).__name__}")
    if layout is not None and value.dim() == 4 and value.shape[1] == 1:
        raise ValueError(f"{function}: {name} must be {layout}, got {tuple(value.shape)}: pass {name}.squeeze(1)")
    if layout is not None and value.dim() != layout.count(",") + 1:
        raise ValueError(f"{function}: {name} must be {layout}, got {value.dim()} axes: {tuple(value.shape)}")
    if value.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{function}: {name} must have dtype uint8, int16, int32 or int64, got {value.dtype}")


def on_device(function: str, name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{function}: {name} must be on device {x.device} as the input is, got {value.device}")


def alike(function: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Same device, and same dtype unless autocast is about to make it so."""
    if a.device != b.device:
        raise ValueError(f"{function}: {second} must be on {first}'s device {a.device}, got {b.device}")
    if a.dtype == b.dtype:
        return
    if not _context.autocasts(a.device.type) or torch.float64 in (a.dtype, b.dtype):
        raise TypeError(f"{function}: {second} must have {first}'s dtype {a.dtype}, got {b.dtype}")


def pair(function: str, name: str, value: Any, *, odd: bool = False) -> tuple[int, int]:
    """An int, or two of them (height, width), each at least 1."""
    both = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(both, Sequence) or len(both) != 2 or not all(type(v) is int for v in both):
        raise TypeError(f"{function}: {name} must be an int or a pair (height, width) of ints, got {value!r}")
    if min(both) < 1 or (odd and not all(v % 2 for v in both)):
        raise ValueError(f"{function}: {name} must be {'odd and ' if odd else ''}at least 1, got {value!r}")
    return both[0], both[1]


def integer(function: str, name: str, value: Any) -> None:
    if type(value) is not int:
        raise TypeError(f"{function}: {name} must be an int, got {value!r}")


def _real(function: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be a number, got {value!r}")


def number(function: str, name: str, value: Any, low: float, high: float) -> None:
    _real(function, name, value)
    if not low <= value <= high:  # NaN too
        raise ValueError(f"{function}: {name} must be in [{low:g}, {high:g}], got {value!r}")


def finite(function: str, name: str, value: Any) -> None:
    _real(function, name, value)
    if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN too; math.isfinite breaks a graph
        raise ValueError(f"{function}: {name} must be finite, got {value!r}")


def odd(function: str, name: str, value: Any) -> None:
    positive(function, name, value)
    if value % 2 == 0:
        raise ValueError(f"{function}: {name} must be odd, got {value}")


def positive(function: str, name: str, value: Any) -> None:
    integer(function, name, value)
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {value}")


def choice(function: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        expected = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{function}: {name} must be one of {expected}, got {value!r}")
