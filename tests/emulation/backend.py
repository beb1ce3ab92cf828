"""Puts the emulated CUDA kernels into the op table as the CPU backend "cuda-emulated", chosen by name only."""

from __future__ import annotations

import functools

from segops import _dispatch
from segops._dispatch import Backend

NAME = "cuda-emulated"


@functools.cache
def missing() -> str | None:
    """None once the emulated kernels are built, loaded and in the table, else the reason."""
    from . import build

    try:
        build.load()
    except build.Unavailable as error:
        return str(error)
    for op in _dispatch.OPS.values():
        cuda = next(row for row in op.backends["cuda"] if row.name == "cuda")
        if cuda.compiled is None:
            emulated = Backend(NAME, None, cuda.available, by_name_only=True)
        else:
            emulated = _dispatch.compiled_row(
                NAME, cuda.compiled, "segops_emulated", None, cuda.why_not, key="CPU", by_name_only=True
            )
        op.backends["cpu"].append(emulated)
    return None
