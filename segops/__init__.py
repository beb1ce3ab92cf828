"""Fused, differentiable layers for semantic segmentation, verified against plain PyTorch.

Importing segops imports neither Triton nor CUDA. Every function accepts any device: the fastest backend that takes the
call runs it (:func:`explain` says which, and why not the others), else the plain-PyTorch reference does.
"""

from __future__ import annotations

from . import compat, dupsampling, metrics, nn, ops, reference
from ._dispatch import BackendError, explain, record, use_backend
from ._info import info
from .ops.local_attention import local_attention

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "compat",
    "dupsampling",
    "explain",
    "info",
    "local_attention",
    "metrics",
    "nn",
    "ops",
    "record",
    "reference",
    "use_backend",
]
