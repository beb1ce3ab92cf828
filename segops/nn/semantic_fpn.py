"""Semantic FPN and Ultra Semantic FPN, necks that gather a pyramid at its finest stride (Huang et al., HFGD, 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ._layers import check_features, check_in_channels, check_strides, conv_bn, init_glorot, resize

__all__ = ["SemanticFPN", "UltraSemanticFPN"]


class SemanticFPN(nn.Module):
    """Pyramid of maps to one map at ``output_stride``, as the authors of HFGD build their baseline.

    Laterals (1x1, BN, ReLU) to ``channels``, each with the next coarser one added after a bilinear resize. Then level i
    goes through ``max(1, i)`` blocks of 3x3 convolution, BN, ReLU and a resize to the next finer map (level 0: no
    resize); the levels are summed and closed by a 1x1 convolution, BN and ReLU. Each halving of ``output_stride`` below
    the finest stride puts one more block on every level; no finer map of the backbone is needed.

    Args:
        in_channels: Width of each map, fine to coarse.
        strides: Stride of each map against the image, fine to coarse.
        channels: Width of the neck. Semantic FPN had 128; every one in HFGD has 256.
        output_stride: ``strides[0]``, or that divided by a power of two: 4, 2 or 1 over a map at stride 4.
        lateral_kernel_size: Of the laterals, odd.
        lateral_last: A lateral on the last map too. Without one it enters as it is and must have ``channels``.
        norm_layer: Width to normalisation.
        align_corners: Corner convention of every resize. With True a side n is doubled to 2n - 1 if it is odd (129 to
            257, the sides of 513 pixels), to 2n if it is even; with False to 2n.

    Attributes:
        in_channels, strides, output_stride: As given.
        out_channels: ``channels``.

    Raises:
        ValueError: lists of different lengths, an output stride that is not ``strides[0]`` over a power of two, a last
            width other than ``channels`` without its lateral; in forward, a wrong number or width of maps.

    Children ``laterals.{i}.{conv,bn}``, ``levels.{i}.{j}.{conv,bn}`` and ``closing.{conv,bn}``, drawn from Glorot's
    uniform distribution.

    Example:
        >>> from segops.nn import SemanticFPN
        >>> neck = SemanticFPN((64, 128, 256), strides=(4, 8, 16), channels=32, lateral_last=True, output_stride=2)
        >>> neck([torch.randn(1, 64, 33, 48), torch.randn(1, 128, 17, 24), torch.randn(1, 256, 9, 12)]).shape
        torch.Size([1, 32, 65, 96])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        channels: int = 256,
        output_stride: int = 4,
        lateral_kernel_size: int = 1,
        lateral_last: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_in_channels(name, in_channels)
        check_strides(name, in_channels, strides)
        for argument, size in (("channels", channels), ("output_stride", output_stride)):
            _checks.positive(name, argument, size)
        _checks.odd(name, "lateral_kernel_size", lateral_kernel_size)
        doublings = (strides[0] // output_stride).bit_length() - 1
        if strides[0] != output_stride << max(doublings, 0):
            raise ValueError(
                f"{name}: output_stride must be strides[0]={strides[0]} over a power of two, got {output_stride}"
            )
        if not lateral_last and in_channels[-1] != channels:
            raise ValueError(
                f"{name}: without lateral_last the last map must have channels={channels}, got {in_channels[-1]}"
            )
        self.in_channels, self.strides, self.out_channels = tuple(in_channels), tuple(strides), channels
        self.output_stride, self.doublings, self.align_corners = output_stride, doublings, align_corners
        last = len(self.in_channels) - (not lateral_last)
        self.laterals = nn.ModuleList(
            conv_bn(width, channels, lateral_kernel_size, norm_layer=norm_layer) for width in self.in_channels[:last]
        )
        self.levels = nn.ModuleList(
            nn.ModuleList(conv_bn(channels, channels, 3, norm_layer=norm_layer) for _ in range(max(1, i) + doublings))
            for i in range(len(self.in_channels))
        )
        self.closing = conv_bn(channels, channels, 1, norm_layer=norm_layer)
        init_glorot(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One map.

        Args:
            features: One map [N, in_channels[i], H_i, W_i] per entry of in_channels, fine to coarse, any sizes.

        Returns:
            [N, channels, H, W]; at ``output_stride=strides[0]`` that is the size of features[0].
        """
        check_features(type(self).__name__, features, self.in_channels)
        maps = [x.contiguous(memory_format=torch.channels_last) for x in features]
        maps[: len(self.laterals)] = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=False)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[2:], self.align_corners)
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        doubled = [sizes[0]]
        for _ in range(self.doublings):
            doubled.append((self._doubled(doubled[-1][0]), self._doubled(doubled[-1][1])))
        levels = []
        for i, (x, blocks) in enumerate(zip(maps, self.levels, strict=True)):
            ends = sizes[: max(i, 1)][::-1] + doubled[1:]
            *before, last = blocks.children()
            for block, end in zip(before, ends[:-1], strict=True):
                x = resize(block(x), end, self.align_corners)
            levels.append(last(x))
        # Resizing is linear: the levels' last resize, the same one for all that have it, comes after their sum.
        own = [] if self.doublings else [levels.pop(0)]
        if levels:
            own.append(resize(reduce(torch.add, levels), doubled[-1], self.align_corners))
        return self.closing(reduce(torch.add, own))

    def _doubled(self, side: int) -> int:
        return 2 * side - (side % 2 if self.align_corners else 0)


class UltraSemanticFPN(SemanticFPN):
    """:class:`SemanticFPN` with 3x3 laterals, U-SFPN; the paper runs it at output stride 4 or 2.

    Args:
        in_channels: Width of each map, fine to coarse.
        lateral_kernel_size: Of the laterals, odd.
        **options: The other keywords of :class:`SemanticFPN`. ``output_stride=1`` works too, at four times the cost of
            2, which the paper calls not affordable.

    Example:
        >>> from segops.nn import UltraSemanticFPN
        >>> neck = UltraSemanticFPN((64, 128, 32), strides=(4, 8, 16), channels=32, output_stride=2)
        >>> neck([torch.randn(1, 64, 32, 48), torch.randn(1, 128, 16, 24), torch.randn(1, 32, 8, 12)]).shape
        torch.Size([1, 32, 64, 96])
    """

    def __init__(self, in_channels: Sequence[int], *, lateral_kernel_size: int = 3, **options: Any) -> None:
        super().__init__(in_channels, lateral_kernel_size=lateral_kernel_size, **options)
