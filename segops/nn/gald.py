"""GALD: global aggregation gathers context, local distribution hands it out again, pixel by pixel (Li et al., GALD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops.local_attention import BORDERS, local_attention
from ._layers import (
    BilinearDecoder,
    check_features,
    check_map,
    conv_bn,
    resize,
)

__all__ = ["GALDHead", "LocalDistributionV2"]

SOURCES = ("concat", "global", "local")


class LocalDistributionV2(nn.Module):
    """LDv2: every pixel attends to a dilated window of the globally aggregated and the local feature.

    ``query``, ``key`` and ``value`` are 1x1 convolutions of ``[x_global, x_local]`` (GALD, eq. 6-8), attention runs in
    :func:`segops.local_attention`, and the output is ``[attention, x_local]``.

    Args:
        global_channels: Width of x_global.
        local_channels: Width of x_local.
        channels: Width of query and key. The paper does not give it.
        value_channels: Width of value and of the attention's output; None means ``channels``.
        kernel_size: Taps per axis, (height, width) or one int for both; odd.
        dilation: Distance between taps in pixels of the map. The paper's text has 3, its best ablation row has 6.
        num_heads: Heads that query, key and value are split into.
        scale: Factor on the logits. The paper has none, hence 1.0; None means 1 / sqrt(channels / num_heads).
        border: What a tap outside the map is, see :func:`segops.local_attention`. ``"zero"`` pads after the
            projections, so that a padded tap has logit 0 and value 0 also when ``bias=True``.
        bias: Biases in the three projections.
        query_from: ``"concat"`` ([x_global, x_local]), ``"global"`` or ``"local"``: what query is projected from.
        key_from: The same for key.
        value_from: The same for value.
        concat_local: Append x_local to the output.

    Attributes:
        out_channels: Width of the output.

    Raises:
        ValueError: widths that are not positive or not multiples of ``num_heads``, an unknown source or border; in
            forward, maps whose width differs from the constructor's or whose batch and size differ from each other.

    Initialisation is PyTorch's. Parameters: ``query``, ``key``, ``value``, each with ``.weight`` [C_out, C_in, 1, 1].

    Example:
        >>> from segops.nn import LocalDistributionV2
        >>> layer = LocalDistributionV2(64, 32, channels=48, kernel_size=5, dilation=3)
        >>> layer(torch.randn(2, 64, 17, 23), torch.randn(2, 32, 17, 23)).shape
        torch.Size([2, 80, 17, 23])
    """

    def __init__(
        self,
        global_channels: int,
        local_channels: int,
        *,
        channels: int = 512,
        value_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 5,
        dilation: int | tuple[int, int] = 6,
        num_heads: int = 1,
        scale: float | None = 1.0,
        border: str = "zero",
        bias: bool = False,
        query_from: str = "concat",
        key_from: str = "concat",
        value_from: str = "concat",
        concat_local: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        value_channels = channels if value_channels is None else value_channels
        for argument, width in (
            ("global_channels", global_channels),
            ("local_channels", local_channels),
            ("channels", channels),
            ("value_channels", value_channels),
            ("num_heads", num_heads),
        ):
            _checks.positive(name, argument, width)
        for argument, width in (("channels", channels), ("value_channels", value_channels)):
            if width % num_heads:
                raise ValueError(f"{name}: {argument} must be a multiple of num_heads={num_heads}, got {width}")
        for argument, source in (("query_from", query_from), ("key_from", key_from), ("value_from", value_from)):
            _checks.choice(name, argument, source, SOURCES)
        _checks.choice(name, "border", border, BORDERS)
        self.kernel_size = _checks.pair(name, "kernel_size", kernel_size, odd=True)
        self.dilation = _checks.pair(name, "dilation", dilation)
        self.global_channels, self.local_channels = global_channels, local_channels
        self.num_heads, self.scale, self.border = num_heads, scale, border
        self.query_from, self.key_from, self.value_from = query_from, key_from, value_from
        self.concat_local = concat_local
        self.out_channels = value_channels + (local_channels if concat_local else 0)

        width_of = {
            "concat": global_channels + local_channels,
            "global": global_channels,
            "local": local_channels,
        }
        self.query = nn.Conv2d(width_of[query_from], channels, 1, bias=bias)
        self.key = nn.Conv2d(width_of[key_from], channels, 1, bias=bias)
        self.value = nn.Conv2d(width_of[value_from], value_channels, 1, bias=bias)

    def forward(self, x_global: Tensor, x_local: Tensor) -> Tensor:
        """Distributes x_global.

        Args:
            x_global: [N, global_channels, H, W], the aggregated feature.
            x_local: [N, local_channels, H, W], the feature it was aggregated from.

        Returns:
            [N, out_channels, H, W].
        """
        name = type(self).__name__
        check_map(name, "x_global", x_global, self.global_channels)
        check_map(name, "x_local", x_local, self.local_channels)
        if x_global.shape[0] != x_local.shape[0] or x_global.shape[2:] != x_local.shape[2:]:
            raise ValueError(
                f"{name}: x_local must have x_global's batch and size, got {tuple(x_local.shape)} and "
                f"{tuple(x_global.shape)}"
            )
        source = {"global": x_global, "local": x_local}
        if "concat" in (self.query_from, self.key_from, self.value_from):
            source["concat"] = torch.cat([x_global, x_local], 1)
        y = local_attention(
            self.query(source[self.query_from]),
            self.key(source[self.key_from]),
            self.value(source[self.value_from]),
            self.kernel_size,
            self.dilation,
            num_heads=self.num_heads,
            scale=self.scale,
            border=self.border,
        )
        return torch.cat([y, x_local], 1) if self.concat_local else y

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, num_heads={self.num_heads}, "
            f"scale={self.scale}, border={self.border!r}"
        )


class GALDHead(BilinearDecoder):
    """Decoder: global aggregation, then local distribution, of the coarsest map; finer maps sharpen the result.

    ``x = features[-1]`` is reduced to ``channels`` (3x3), aggregated (``ga``), distributed (``ld``), concatenated with
    x itself and fused by a 3x3 convolution. Each finer map joins as in DeepLabV3+: narrowed by a 1x1 convolution and
    concatenated with the upsampled coarser one under a 3x3 convolution. A 1x1 convolution with bias gives the logits.

    Args:
        in_channels: Width of each feature map, fine to coarse.
        num_classes: K >= 2.
        strides: Stride of each map against the image, fine to coarse; None means the coarsest at 8, the backbone output
            stride of GALD, and each finer map at half the stride of the next.
        channels: Width inside the decoder, and of query, key and value.
        ga: Global aggregation: ``"psp"`` (pyramid pooling, bins 1, 2, 3, 6) or None.
        ld: Local distribution: ``"v2"`` (:class:`LocalDistributionV2`) or None.
        arrangement: ``"gald"``, that is LD(GA(x)).
        kernel_size: Taps per axis of LDv2.
        dilation: Distance between its taps, in pixels of the coarsest map.
        num_heads: Its heads.
        scale: Its factor on the logits.
        border: Its border rule.
        skip_channels: Width that a finer map is narrowed to.
        dropout: Channel dropout after pyramid pooling.
        align_corners: Corner convention of every resize, True in the official code.

    Attributes:
        in_channels, strides, num_classes: As given.
        output_stride: Stride of the logits, that of the finest map.

    Raises:
        ValueError: unsupported ``ga``, ``ld`` or ``arrangement``; lists of different lengths; in forward, a wrong
            number or width of maps, and in training mode with ``ga="psp"`` a batch of one, of whose 1x1 bin BatchNorm
            cannot take statistics.

    Initialisation is PyTorch's, as in the official code.

    Example:
        >>> from segops.nn import GALDHead
        >>> head = GALDHead((32, 64), 11, channels=48, ga="psp", ld="v2", dilation=3)
        >>> head([torch.randn(2, 32, 40, 60), torch.randn(2, 64, 20, 30)]).shape
        torch.Size([2, 11, 40, 60])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        strides: Sequence[int] | None = None,
        channels: int = 512,
        ga: str | None,
        ld: str | None,
        arrangement: str = "gald",
        kernel_size: int | tuple[int, int] = 5,
        dilation: int | tuple[int, int] = 6,
        num_heads: int = 1,
        scale: float | None = 1.0,
        border: str = "zero",
        skip_channels: int = 48,
        dropout: float = 0.1,
        align_corners: bool = True,
    ) -> None:
        super().__init__(in_channels, num_classes, strides, align_corners, coarsest=8)
        name = type(self).__name__
        for argument, given, supported in (("ga", ga, ("psp", None)), ("ld", ld, ("v2", None))):
            if given not in supported:
                raise ValueError(f"{name}: {argument} must be {supported[0]!r} or None, got {given!r}")
        if arrangement != "gald":
            raise ValueError(f"{name}: arrangement must be 'gald', got {arrangement!r}")

        *skips, coarsest = self.in_channels
        self.reduce = conv_bn(coarsest, channels, 3)
        self.ga = _PyramidPooling(channels, dropout, align_corners) if ga == "psp" else nn.Identity()
        self.ld: nn.Module | None = None
        if ld == "v2":
            source = "concat" if ga else "local"  # without GA both maps are the same one
            self.ld = LocalDistributionV2(
                channels, channels, channels=channels, kernel_size=kernel_size, dilation=dilation,
                num_heads=num_heads, scale=scale, border=border,
                query_from=source, key_from=source, value_from=source,
            )  # fmt: skip
        self.fuse = conv_bn(coarsest + (self.ld.out_channels if self.ld else channels), channels, 3)
        self.laterals = nn.ModuleList(conv_bn(width, skip_channels, 1) for width in skips)
        self.merges = nn.ModuleList(conv_bn(channels + skip_channels, channels, 3) for _ in skips)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(
        self, features: Sequence[Tensor], *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Raw logits.

        Args:
            features: One map [N, in_channels[i], H_i, W_i] per entry of in_channels, fine to coarse, any sizes.
            return_aux: Also return the auxiliary outputs.

        Returns:
            logits [N, num_classes, H_0, W_0]; with ``return_aux`` also a dict, empty in this configuration.
        """
        name = type(self).__name__
        check_features(name, features, self.in_channels)
        *skips, coarsest = features
        x_local = self.reduce(coarsest)
        x = self.ga(x_local)
        if self.ld is not None:
            x = self.ld(x, x_local)
        x = self.fuse(torch.cat([coarsest, x], 1))
        for i in reversed(range(len(skips))):
            x = resize(x, skips[i].shape[2:], self.align_corners)
            x = self.merges[i](torch.cat([x, self.laterals[i](skips[i])], 1))
        logits = self.classifier(x)
        return (logits, {}) if return_aux else logits


class _PyramidPooling(nn.Module):
    """PSP: average pools of 1, 2, 3 and 6 bins per axis, each through 1x1 conv and BN without activation, beside x."""

    def __init__(self, channels: int, dropout: float, align_corners: bool, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.align_corners = align_corners
        self.stages = nn.ModuleList(conv_bn(channels, channels, 1, activate=False) for _ in bins)
        self.bottleneck = conv_bn((1 + len(self.bins)) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [stage(F.adaptive_avg_pool2d(x, n)) for n, stage in zip(self.bins, self.stages, strict=True)]
        pooled = [resize(p, x.shape[2:], self.align_corners) for p in pooled]
        return self.dropout(self.bottleneck(torch.cat([*pooled, x], 1)))
