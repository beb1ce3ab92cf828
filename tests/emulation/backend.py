"""Puts the emulated CUDA kernels into the op table as the CPU backend "cuda-emulated", chosen by name only."""

from __future__ import annotations

import functools

from segops import _dispatch
from segops._dispatch import Backend


@functools.cache
def missing() -> str | None:
    """None once the emulated kernels are built, loaded and in the table, else the reason."""
    from . import build

    try:
        build.load()
    except build.Unavailable as error:
        return str(error)
    for op in _dispatch.OPS.values():
        if op.native is not None:
            op.backends["cpu"].append(Backend("cuda-emulated", op.native("segops_emulated"), by_name_only=True))
    return None
