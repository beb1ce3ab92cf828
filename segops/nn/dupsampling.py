"""DUpsampling: a matrix learned from labels turns a low-resolution map into pixels (Tian et al., DUpsampling)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops.dupsample import dupsample
from ..ops.dupsample_argmax import dupsample_argmax
from ..ops.dupsample_cross_entropy import dupsample_cross_entropy
from ._layers import (
    BilinearUpsampling,
    check_classes,
    check_features,
    check_in_channels,
    check_map,
    check_strides,
    conv_bn,
    init_gaussian,
    read_labels,
    resize,
    separable_conv_bn,
)

__all__ = ["CompressedLabelLoss", "DUpsampling", "DUpsamplingDecoder"]

ORDERS = ("dy_dx_class", "dx_dy_class", "class_dy_dx")
UPSAMPLERS = ("dup", "bilinear")


class Fit(Protocol):
    """What :func:`segops.dupsampling.fit` returns."""

    weight: Any
    bias: Any
    projection: Any
    num_classes: int
    scale_factor: int


class DUpsampling(nn.Module):
    """Each cell of a low-resolution map gives the logits of a window of pixels: ``(W x + b) / T`` (DUpsampling, 3.1).

    Row n = (dy * r + dx) * K + k of W belongs to class k of pixel (r*i + dy, r*j + dx), the order of LinZhuoChen's and
    Tramac's weights; :meth:`from_conv` takes the others. :meth:`loss` and :meth:`predict` never make the logits.

    Args:
        in_channels: C, width of the map.
        num_classes: K >= 2.
        scale_factor: r, side of a window in pixels.
        bias: An offset per row, the mean window where W comes from labels. Neither reimplementation has one.
        temperature: T, initially; not 0. Its sign is not constrained.
        learn_temperature: Train T, the paper's adaptive-temperature softmax; else it stays as given.
        train_w: Train W and the bias; else ``requires_grad`` is False. The state_dict is the same either way.

    Raises:
        ValueError: a width, class number or scale factor out of range, a temperature of 0 or not finite; in forward,
            a map of another width, or a size that does not belong to it.

    W is drawn from a Gaussian of standard deviation 0.1, the bias is 0. Parameters: ``weight`` [r*r*K, C, 1, 1],
    ``bias`` [r*r*K], ``temperature`` [1].

    Example:
        >>> from segops.nn import DUpsampling
        >>> layer = DUpsampling(64, num_classes=21, scale_factor=16)
        >>> x = torch.randn(2, 64, 33, 33)
        >>> layer(x, size=(513, 513)).shape
        torch.Size([2, 21, 513, 513])
        >>> layer.loss(x, torch.zeros(2, 513, 513, dtype=torch.uint8)).shape, layer.predict(x, (513, 513)).dtype
        (torch.Size([]), torch.uint8)
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        scale_factor: int,
        *,
        bias: bool = True,
        temperature: float = 1.0,
        learn_temperature: bool = True,
        train_w: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.positive(name, "in_channels", in_channels)
        _checks.positive(name, "scale_factor", scale_factor)
        check_classes(name, num_classes)
        if temperature == 0 or not math.isfinite(temperature):
            raise ValueError(f"{name}: temperature must be finite and not 0, got {temperature}")
        self.in_channels, self.num_classes, self.scale_factor = in_channels, num_classes, scale_factor
        rows = scale_factor * scale_factor * num_classes
        self.weight = nn.Parameter(torch.empty(rows, in_channels, 1, 1), requires_grad=train_w)
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows), requires_grad=train_w) if bias else None)
        self.temperature = nn.Parameter(torch.tensor([float(temperature)]), requires_grad=learn_temperature)
        nn.init.normal_(self.weight, std=0.1)

    @classmethod
    def from_fit(cls, fit: Fit, **options: Any) -> DUpsampling:
        """The layer with W and the bias of :func:`segops.dupsampling.fit`; ``options`` as for the class."""
        layer = cls(fit.weight.shape[1], fit.num_classes, fit.scale_factor, **options)
        layer.load_fit(fit)
        return layer

    @torch.no_grad()
    def load_fit(self, fit: Fit) -> None:
        """Copies W, and the bias where this layer has one, from :func:`segops.dupsampling.fit`."""
        self._load(torch.as_tensor(fit.weight), None if fit.bias is None else torch.as_tensor(fit.bias), "fit")

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, scale_factor: int, *, order: str, **options: Any) -> DUpsampling:
        """The layer that computes what a 1x1 convolution and a rearrangement compute.

        Args:
            conv: 1x1, with r*r*K output channels.
            scale_factor: r.
            order: What an output channel counts, slowest first: ``"dy_dx_class"``, as here, ``"dx_dy_class"``, of
                older public weights, or ``"class_dy_dx"``, that of :class:`torch.nn.PixelShuffle`.
            options: As for the class.
        """
        name = f"{cls.__name__}.from_conv"
        _checks.positive(name, "scale_factor", scale_factor)
        _checks.choice(name, "order", order, ORDERS)
        padding = conv.padding not in ((0, 0), "valid")
        if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1 or padding:
            raise ValueError(f"{name}: conv must be 1x1 with stride 1, no padding and one group, got {conv}")
        r, rows = scale_factor, conv.out_channels
        if rows % (r * r):
            raise ValueError(f"{name}: conv must have a multiple of {r}*{r} output channels, got {rows}")
        layer = cls(conv.in_channels, rows // (r * r), r, bias=conv.bias is not None, **options)
        with torch.no_grad():
            bias = None if conv.bias is None else _reordered(conv.bias, order, r)
            layer._load(_reordered(conv.weight, order, r), bias, "conv")
        return layer

    @classmethod
    def from_pixel_shuffle(cls, conv: nn.Conv2d, scale_factor: int, **options: Any) -> DUpsampling:
        """The layer that computes ``nn.PixelShuffle(scale_factor)(conv(x))``; see :meth:`from_conv`."""
        return cls.from_conv(conv, scale_factor, order="class_dy_dx", **options)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Logits at full size, which this stores; see :meth:`loss` and :meth:`predict`.

        Args:
            x: [N, C, h, w].
            size: H and W, the upper left part of the r*h by r*w pixels; None means all. r*(h-1) < H <= r*h.

        Returns:
            [N, K, H, W].
        """
        return dupsample(x, self.weight, self.bias, scale_factor=self.scale_factor, temperature=self.temperature,
                         size=size)  # fmt: skip

    def loss(self, x: Tensor, target: Tensor, **ce: Any) -> Tensor:
        """Cross-entropy of the logits (DUpsampling, eq. 5).

        Args:
            x: [N, C, h, w].
            target: [N, H, W], integer labels.
            ce: Keywords of :func:`segops.dupsample_cross_entropy`: ``class_weight``, ``ignore_index``, ....
        """
        return dupsample_cross_entropy(x, self.weight, target, bias=self.bias, scale_factor=self.scale_factor,
                                       temperature=self.temperature, **ce)  # fmt: skip

    @torch.no_grad()
    def predict(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The argmax of the logits: [N, H, W], uint8 for up to 255 classes, else int64; ``size`` as in forward."""
        return dupsample_argmax(x, self.weight, self.bias, scale_factor=self.scale_factor,
                                temperature=self.temperature, size=size)  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.num_classes}, {self.scale_factor}, bias={self.bias is not None}, "
            f"learn_temperature={self.temperature.requires_grad}, train_w={self.weight.requires_grad}"
        )

    def _load(self, weight: Tensor, bias: Tensor | None, source: str) -> None:
        if weight.shape[:2] != self.weight.shape[:2]:
            raise ValueError(
                f"{type(self).__name__}: {source} must have a weight {list(self.weight.shape[:2])}, "
                f"got {list(weight.shape[:2])}"
            )
        self.weight.copy_(weight.view_as(self.weight))
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)


class DUpsamplingDecoder(nn.Module):
    """Decoder: low-level features join one after another, then DUpsampling or bilinear interpolation (3.3).

    A round narrows the low-level feature to ``low_channels`` (1x1), concatenates it with x, and applies two separable
    3x3 convolutions. With ``upsampler="dup"`` the feature is first resized to the last map's size and rounds run fine
    to coarse, all at the last map's size; with ``"bilinear"`` x is resized to the feature's size and rounds run coarse
    to fine: DeepLabv3+'s decoder, the paper's "vanilla" one.

    Args:
        in_channels: Width of each map, fine to coarse; the last one is the output of :class:`ASPP`.
        num_classes: K >= 2.
        strides: Stride of each map against the image, fine to coarse.
        scale_factor: r of DUpsampling, a divisor of the last stride; None means the last stride, with logits for
            every pixel of the image.
        channels: Width inside the decoder.
        low_channels: Width that a low-level feature is narrowed to.
        dup_channels: Width of the map that DUpsampling decodes: 64 (ResNet-50) or 128 (Xception) in the paper.
        upsampler: ``"dup"`` or ``"bilinear"``.
        bias: As in :class:`DUpsampling`, and the next three.
        temperature: Initial T.
        learn_temperature: Train T.
        train_w: Train W and its bias.
        align_corners: Corner convention of every resize, True in DeepLab.
        norm_layer: Width to normalisation. DeepLab's BatchNorm has momentum 3e-4.

    Attributes:
        in_channels, strides, num_classes: As given.
        output_stride: Stride of the logits.
        upsample: The :class:`DUpsampling`; ``upsample.load_fit`` gives it a W learned from labels.

    Raises:
        ValueError: lists of different lengths, a scale factor that does not divide the last stride; in forward, a
            wrong number or width of maps.

    Convolutions are drawn from a Gaussian of standard deviation 0.1, their biases are 0.

    Example:
        >>> from segops.nn import DUpsamplingDecoder
        >>> head = DUpsamplingDecoder((64, 256), num_classes=21, strides=(4, 16))
        >>> features = [torch.randn(2, 64, 33, 33), torch.randn(2, 256, 9, 9)]
        >>> head(features).shape
        torch.Size([2, 21, 144, 144])
        >>> head.predict(features, size=(129, 129)).shape
        torch.Size([2, 129, 129])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        strides: Sequence[int],
        scale_factor: int | None = None,
        channels: int = 256,
        low_channels: int = 48,
        dup_channels: int = 64,
        upsampler: str = "dup",
        bias: bool = True,
        temperature: float = 1.0,
        learn_temperature: bool = True,
        train_w: bool = True,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_in_channels(name, in_channels)
        check_strides(name, in_channels, strides)
        check_classes(name, num_classes)
        _checks.choice(name, "upsampler", upsampler, UPSAMPLERS)
        for argument, width in (("channels", channels), ("low_channels", low_channels), ("dup_channels", dup_channels)):
            _checks.positive(name, argument, width)
        if upsampler == "bilinear" and scale_factor is not None:
            raise ValueError(f"{name}: scale_factor belongs to upsampler='dup', got {scale_factor} with 'bilinear'")
        scale_factor = strides[-1] if scale_factor is None else scale_factor
        if scale_factor < 1 or strides[-1] % scale_factor:
            raise ValueError(f"{name}: scale_factor must divide the last stride {strides[-1]}, got {scale_factor}")
        self.in_channels, self.strides, self.num_classes = tuple(in_channels), tuple(strides), num_classes
        self.upsampler, self.align_corners = upsampler, align_corners
        self.output_stride = strides[-1] // scale_factor if upsampler == "dup" else strides[0]

        *low, width = self.in_channels
        # Every round but the first in order of execution finds x at ``channels``.
        first = 0 if upsampler == "dup" else len(low) - 1
        self.rounds = nn.ModuleList(
            _FusionRound(width if i == first else channels, c, channels, low_channels, norm_layer)
            for i, c in enumerate(low)
        )
        out_channels = dup_channels if upsampler == "dup" else num_classes
        self.project = nn.Conv2d(channels if low else width, out_channels, 1)
        init_gaussian(self)
        self.upsample: DUpsampling | BilinearUpsampling
        if upsampler == "dup":
            self.upsample = DUpsampling(
                dup_channels, num_classes, scale_factor, bias=bias, temperature=temperature,
                learn_temperature=learn_temperature, train_w=train_w,
            )  # fmt: skip
        else:
            self.upsample = BilinearUpsampling(align_corners)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """What the upsampling gets, the paper's F: [N, dup_channels, h, w]; for "bilinear", logits [N, K, H_0, W_0]."""
        check_features(type(self).__name__, features, self.in_channels)
        *low, x = features
        if self.upsampler == "dup":
            for fuse, feature in zip(self.rounds, low, strict=True):
                x = fuse(x, resize(feature, x.shape[2:], self.align_corners))
        else:
            for fuse, feature in zip(reversed(self.rounds), reversed(low), strict=True):
                x = fuse(resize(x, feature.shape[2:], self.align_corners), feature)
        return self.project(x)

    def forward(
        self, features: Sequence[Tensor], *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Raw logits at ``output_stride``; with "dup" these are large, see :meth:`loss` and :meth:`predict`.

        Args:
            features: One map [N, in_channels[i], H_i, W_i] per entry of in_channels, fine to coarse, any sizes.
            return_aux: Also return the auxiliary outputs.

        Returns:
            logits [N, K, r*h, r*w], or [N, K, H_0, W_0] for "bilinear"; with ``return_aux`` also a dict, of
            ``"decoded"``, what :meth:`decode` returns.
        """
        decoded = self.decode(features)
        logits = self.upsample(decoded)
        return (logits, {"decoded": decoded}) if return_aux else logits

    def loss(self, features: Sequence[Tensor], target: Tensor, **ce: Any) -> Tensor:
        """Cross-entropy at the target's size, without the logits of that size.

        Args:
            features: As for :meth:`forward`.
            target: [N, H, W], integer labels; for "dup" r*(h-1) < H <= r*h, for "bilinear" any size.
            ce: Keywords of :func:`segops.dupsample_cross_entropy` or :func:`segops.upsample_cross_entropy`.
        """
        return self.upsample.loss(self.decode(features), target, **ce)

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Labels [N, *size], uint8 for up to 255 classes, without the logits; ``size`` as for the target of a loss."""
        return self.upsample.predict(self.decode(features), size)


class _FusionRound(nn.Module):
    def __init__(
        self, in_channels: int, feature: int, channels: int, low: int, norm_layer: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.lateral = conv_bn(feature, low, 1, norm_layer=norm_layer)
        self.first = separable_conv_bn(in_channels + low, channels, norm_layer=norm_layer)
        self.second = separable_conv_bn(channels, channels, norm_layer=norm_layer)

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        return self.second(self.first(torch.cat([x, self.lateral(feature)], 1)))


class CompressedLabelLoss(nn.Module):
    """Regression on compressed labels, ``|x - P (v - m)|^2`` summed over channels (DUpsampling, eq. 4).

    v is the one-hot window of a cell, with zeros at ignored pixels. It is never formed: P v is a sum of columns of P.
    The mean runs over the cells that have a labelled pixel.

    Args:
        fit: From :func:`segops.dupsampling.fit`: P is its ``projection``, m its ``bias``.

    Example:
        >>> from types import SimpleNamespace
        >>> from segops.nn import CompressedLabelLoss
        >>> fit = SimpleNamespace(projection=torch.randn(8, 48), bias=torch.zeros(48), num_classes=3, scale_factor=4)
        >>> loss = CompressedLabelLoss(fit)
        >>> target = torch.zeros(2, 15, 20, dtype=torch.uint8)
        >>> loss(torch.randn(2, 8, 4, 5), target).shape
        torch.Size([])
    """

    table: Tensor
    offset: Tensor

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        projection = torch.as_tensor(fit.projection).float()
        self.num_classes, self.scale_factor = fit.num_classes, fit.scale_factor
        rows = self.scale_factor**2 * self.num_classes
        if projection.dim() != 2 or projection.shape[1] != rows:
            raise ValueError(
                f"{type(self).__name__}: fit.projection must be [C, {rows}] for {self.num_classes} classes and "
                f"scale_factor={self.scale_factor}, got {tuple(projection.shape)}"
            )
        # The last row is that of ignored pixels.
        self.register_buffer("table", torch.cat([projection.t(), projection.new_zeros(1, projection.shape[0])]))
        mean = projection.new_zeros(rows) if fit.bias is None else torch.as_tensor(fit.bias).float()
        self.register_buffer("offset", (projection.double() @ mean.double()).float())

    def compress(self, target: Tensor, *, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
        """Compressed labels P (v - m) [N, C, h, w], and which cells have a labelled pixel, bool [N, h, w]."""
        labels, known = read_labels(f"{type(self).__name__}.compress", "target", target, self.num_classes, ignore_index)
        r, (n, height, width) = self.scale_factor, target.shape
        h, w = -(-height // r), -(-width // r)
        y, x = (torch.arange(side, device=target.device) % r for side in (height, width))
        nothing = self.table.shape[0] - 1
        rows = (labels + (y[:, None] * r + x) * self.num_classes).masked_fill(~known, nothing)
        rows = F.pad(rows, (0, w * r - width, 0, h * r - height), value=nothing)
        windows = rows.view(n, h, r, w, r).transpose(2, 3).reshape(n * h * w, r * r)
        compressed = F.embedding_bag(windows, self.table, mode="sum", padding_idx=nothing) - self.offset
        return compressed.view(n, h, w, -1).permute(0, 3, 1, 2), (windows != nothing).any(1).view(n, h, w)

    def forward(self, x: Tensor, target: Tensor, *, ignore_index: int = 255) -> Tensor:
        """The loss, a scalar.

        Args:
            x: [N, C, h, w], the map that DUpsampling is to decode.
            target: [N, H, W], integer labels, h = ceil(H / r) and w = ceil(W / r).
            ignore_index: Label of pixels without meaning.
        """
        name = type(self).__name__
        check_map(name, "x", x, self.table.shape[1])
        compressed, labelled = self.compress(target, ignore_index=ignore_index)
        if x.shape != compressed.shape:
            raise ValueError(
                f"{name}: x must be {list(compressed.shape)} for a target {list(target.shape)}, got {list(x.shape)}"
            )
        return ((x - compressed).square().sum(1) * labelled).sum() / labelled.sum().clamp(min=1)


def _reordered(rows: Tensor, order: str, r: int) -> Tensor:
    """Rows of a weight [r*r*K, ...] in ``order`` to rows in the order of :class:`DUpsampling`."""
    if order == "class_dy_dx":
        return rows.unflatten(0, (-1, r, r)).permute(1, 2, 0, *range(3, rows.dim() + 2)).flatten(0, 2)
    if order == "dx_dy_class":
        return rows.unflatten(0, (r, r, -1)).transpose(0, 1).flatten(0, 2)
    return rows
