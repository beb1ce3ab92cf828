"""Modules that hold the parameters of the papers' layers and call :mod:`segops.ops`."""

from .aspp import ASPP
from .dupsampling import CompressedLabelLoss, DUpsampling, DUpsamplingDecoder
from .gald import GALDHead, LocalDistributionV2
from .label_autoencoder import LabelAutoencoder

__all__ = [
    "ASPP",
    "CompressedLabelLoss",
    "DUpsampling",
    "DUpsamplingDecoder",
    "GALDHead",
    "LabelAutoencoder",
    "LocalDistributionV2",
]
