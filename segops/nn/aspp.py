"""Atrous spatial pyramid pooling: the end of the encoder in DeepLabv3+ and in DUpsampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ._layers import check_map, conv_bn, init_gaussian, separable_conv_bn

__all__ = ["ASPP"]


class ASPP(nn.Module):
    """1x1 convolution, dilated 3x3 convolutions and the image's mean, each to ``channels``, then 1x1 over all of them.

    Args:
        in_channels: Width of the backbone's last map.
        channels: Width of every branch and of the output.
        rates: Dilation of each 3x3 branch: (6, 12, 18) at stride 16, twice that at stride 8.
        separable: Separable 3x3 branches, DeepLab's choice with Xception.
        dropout: Dropout of the output, 0.1 in DeepLab.
        norm_layer: Width to normalisation.

    Raises:
        ValueError: a width or rate out of range; in forward, a map of another width, and in training mode a batch of
            one, of whose mean BatchNorm cannot take statistics.

    Convolutions are drawn from a Gaussian of standard deviation 0.1, as the paper's new layers.

    Example:
        >>> from segops.nn import ASPP
        >>> ASPP(512, channels=64).eval()(torch.randn(1, 512, 33, 33)).shape
        torch.Size([1, 64, 33, 33])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        separable: bool = False,
        dropout: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.positive(name, "in_channels", in_channels)
        _checks.positive(name, "channels", channels)
        for i, rate in enumerate(rates):
            _checks.positive(name, f"rates[{i}]", rate)
        self.in_channels, self.out_channels = in_channels, channels

        def dilated(rate: int) -> nn.Module:
            if separable:
                return separable_conv_bn(in_channels, channels, dilation=rate, norm_layer=norm_layer)
            return conv_bn(in_channels, channels, 3, dilation=rate, norm_layer=norm_layer)

        self.branches = nn.ModuleList(
            [conv_bn(in_channels, channels, 1, norm_layer=norm_layer), *(dilated(rate) for rate in rates)]
        )
        self.pool = conv_bn(in_channels, channels, 1, norm_layer=norm_layer)
        self.project = conv_bn((2 + len(rates)) * channels, channels, 1, norm_layer=norm_layer)
        self.dropout = nn.Dropout(dropout)
        init_gaussian(self)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, channels, H, W]."""
        check_map(type(self).__name__, "x", x, self.in_channels)
        mean = self.pool(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:])
        return self.dropout(self.project(torch.cat([*(branch(x) for branch in self.branches), mean], 1)))
