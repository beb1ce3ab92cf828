"""Fused, differentiable layers for semantic segmentation, verified against plain PyTorch.

Importing segops imports neither Triton nor CUDA. Every function accepts any device: the fastest backend that takes the
call runs it (:func:`explain` says which, and why not the others), else the plain-PyTorch reference does.
"""

from __future__ import annotations

from . import compat, dupsampling, metrics, nn, ops, reference
from ._dispatch import BackendError, explain, record, use_backend
from ._fuse import fuse, unfuse
from ._info import info
from .ops.axial_attention import axial_attention
from .ops.car_losses import car_losses
from .ops.class_centers import class_centers
from .ops.confusion_matrix import confusion_matrix
from .ops.dupsample import dupsample
from .ops.dupsample_argmax import dupsample_argmax
from .ops.dupsample_cross_entropy import dupsample_cross_entropy
from .ops.local_attention import local_attention
from .ops.msca import msca
from .ops.multi_scale_strip_conv import multi_scale_strip_conv
from .ops.nmf2d import nmf2d
from .ops.upsample_argmax import upsample_argmax
from .ops.upsample_cross_entropy import upsample_cross_entropy

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "axial_attention",
    "car_losses",
    "class_centers",
    "compat",
    "confusion_matrix",
    "dupsample",
    "dupsample_argmax",
    "dupsample_cross_entropy",
    "dupsampling",
    "explain",
    "fuse",
    "info",
    "local_attention",
    "metrics",
    "msca",
    "multi_scale_strip_conv",
    "nmf2d",
    "nn",
    "ops",
    "record",
    "reference",
    "unfuse",
    "upsample_argmax",
    "upsample_cross_entropy",
    "use_backend",
]
