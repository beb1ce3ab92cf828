"""Modules that hold the parameters of the papers' layers and call :mod:`segops.ops`."""

from .aspp import ASPP
from .car import CAR
from .dupsampling import CompressedLabelLoss, DUpsampling, DUpsamplingDecoder
from .gald import GALDHead, LocalDistributionV2
from .label_autoencoder import LabelAutoencoder
from .light_ham import LightHamHead, MLPHead
from .mscan import MSCA, MSCAN
from .official import official_state_dict
from .segnext import SegmentationModel, SegNeXt

__all__ = [
    "ASPP",
    "CAR",
    "MSCA",
    "MSCAN",
    "CompressedLabelLoss",
    "DUpsampling",
    "DUpsamplingDecoder",
    "GALDHead",
    "LabelAutoencoder",
    "LightHamHead",
    "LocalDistributionV2",
    "MLPHead",
    "SegNeXt",
    "SegmentationModel",
    "official_state_dict",
]
