"""The operators. Importing a module here puts its op into the table; the functions stay in their modules."""

from .. import _dispatch
from . import (
    axial_attention,
    car_losses,
    class_centers,
    confusion_matrix,
    dupsample,
    dupsample_argmax,
    dupsample_cross_entropy,
    local_attention,
    msca,
    multi_scale_strip_conv,
    nmf2d,
    upsample_argmax,
    upsample_cross_entropy,
)

__all__ = [
    "axial_attention",
    "car_losses",
    "class_centers",
    "confusion_matrix",
    "dupsample",
    "dupsample_argmax",
    "dupsample_cross_entropy",
    "local_attention",
    "msca",
    "multi_scale_strip_conv",
    "nmf2d",
    "upsample_argmax",
    "upsample_cross_entropy",
]

_dispatch.apply_environment()
