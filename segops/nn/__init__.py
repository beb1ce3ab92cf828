"""Modules that hold the parameters of the papers' layers and call :mod:`segops.ops`."""

from .aspp import ASPP
from .axial import AxialAttention2d
from .car import CAR
from .dupsampling import CompressedLabelLoss, DUpsampling, DUpsamplingDecoder
from .gald import GALDHead, LocalDistributionV2
from .hfgd import HFGD, CAEOutput, ContextAugmentedEncoder, HFGDHead
from .label_autoencoder import LabelAutoencoder
from .light_ham import LightHamHead, MLPHead
from .mscan import MSCA, MSCAN
from .official import official_state_dict
from .segnext import SegmentationModel, SegNeXt
from .self_attention import SelfAttention2d
from .semantic_fpn import SemanticFPN, UltraSemanticFPN

__all__ = [
    "ASPP",
    "CAR",
    "HFGD",
    "MSCA",
    "MSCAN",
    "AxialAttention2d",
    "CAEOutput",
    "CompressedLabelLoss",
    "ContextAugmentedEncoder",
    "DUpsampling",
    "DUpsamplingDecoder",
    "GALDHead",
    "HFGDHead",
    "LabelAutoencoder",
    "LightHamHead",
    "LocalDistributionV2",
    "MLPHead",
    "SegNeXt",
    "SegmentationModel",
    "SelfAttention2d",
    "SemanticFPN",
    "UltraSemanticFPN",
    "official_state_dict",
]
