"""Modules that hold the parameters of the papers' layers and call :mod:`segops.ops`."""

from .gald import GALDHead, LocalDistributionV2

__all__ = ["GALDHead", "LocalDistributionV2"]
