"""What the decoders share: blocks, resizing, and the checks of the decoder contract."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops.upsample_argmax import upsample_argmax
from ..ops.upsample_cross_entropy import upsample_cross_entropy


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activate: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Children ``conv``, ``bn`` (``gn`` for a GroupNorm) and ``act``; padded so that stride 1 keeps the size."""
    padding = dilation * (kernel_size // 2)
    norm = norm_layer(out_channels)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
    )
    layers["gn" if isinstance(norm, nn.GroupNorm) else "bn"] = norm
    if activate:
        layers["act"] = nn.ReLU()
    return nn.Sequential(layers)


def separable_conv_bn(
    in_channels: int,
    out_channels: int,
    *,
    dilation: int = 1,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """3x3 ``depthwise``, then ``pointwise``, BN and ReLU after both: DeepLab's split_separable_conv2d."""
    depthwise = conv_bn(in_channels, in_channels, 3, dilation=dilation, groups=in_channels, norm_layer=norm_layer)
    pointwise = conv_bn(in_channels, out_channels, 1, norm_layer=norm_layer)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


class BilinearUpsampling(nn.Module):
    """Logits to any size; it holds no parameters."""

    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, logits: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return logits if size is None else resize(logits, size, self.align_corners)

    def loss(self, logits: Tensor, target: Tensor, **ce: Any) -> Tensor:
        return upsample_cross_entropy(logits, target, align_corners=self.align_corners, **ce)

    @torch.no_grad()
    def predict(self, logits: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (logits.shape[2], logits.shape[3]) if size is None else size
        return upsample_argmax(logits, size, align_corners=self.align_corners)


class BilinearDecoder(nn.Module):
    """What decoders share whose logits, at the stride of the finest map, are upsampled bilinearly.

    ``strides=None`` means that the last map is at ``coarsest``, each finer one at half of the next, at least 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        strides: Sequence[int] | None,
        align_corners: bool,
        coarsest: int = 32,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_in_channels(name, in_channels)
        if strides is None:
            strides = [max(coarsest >> i, 1) for i in range(len(in_channels))][::-1]
        check_strides(name, in_channels, strides)
        check_classes(name, num_classes)
        self.in_channels, self.strides, self.num_classes = tuple(in_channels), tuple(strides), num_classes
        self.output_stride = self.strides[0]
        self.align_corners = align_corners
        self.upsample = BilinearUpsampling(align_corners)

    def loss(self, features: Sequence[Tensor], target: Tensor, **ce: Any) -> Tensor:
        """Cross-entropy at the target's size, without the logits of that size.

        Args:
            features: As for :meth:`forward`.
            target: [N, H, W], integer labels, of any size.
            ce: Keywords of :func:`segops.upsample_cross_entropy`.
        """
        return self.upsample.loss(self(features), target, **ce)

    @torch.no_grad()
    def predict(self, features: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Labels [N, *size], uint8 for up to 255 classes, without the logits of that size.

        Args:
            features: As for :meth:`forward`.
            size: Height and width of the labels, usually those of the image; None means those of the logits.
        """
        return self.upsample.predict(self(features), size)


def init_gaussian(module: nn.Module, std: float = 0.1) -> None:
    """Convolutions from a Gaussian of mean 0, their biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def init_glorot(module: nn.Module) -> None:
    """Convolutions from Glorot's uniform distribution, their biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def check_classes(name: str, num_classes: int) -> None:
    _checks.positive(name, "num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(
            f"{name}: num_classes must be at least 2, got {num_classes}; for one foreground class use 2 classes"
        )


def check_strides(name: str, in_channels: Sequence[int], strides: Sequence[int]) -> None:
    if len(strides) != len(in_channels):
        raise ValueError(
            f"{name}: strides must have one entry per map of in_channels ({len(in_channels)}), got {tuple(strides)}"
        )
    for stride in strides:
        _checks.positive(name, "strides", stride)
    if list(strides) != sorted(strides):
        raise ValueError(f"{name}: strides must run fine to coarse, got {tuple(strides)}")


def check_in_channels(name: str, in_channels: Sequence[int]) -> None:
    if not in_channels:
        raise ValueError(f"{name}: in_channels must name at least one map, got {in_channels!r}")


def check_map(name: str, argument: str, x: Tensor, channels: int) -> None:
    _checks.tensor(name, argument, x, "[N, C, H, W]")
    if x.shape[1] != channels:
        raise ValueError(f"{name}: {argument} must have {channels} channels, got {tuple(x.shape)}")


def check_features(name: str, features: Sequence[Tensor], in_channels: Sequence[int]) -> None:
    if len(features) != len(in_channels):
        raise ValueError(f"{name}: expected {len(in_channels)} feature maps, got {len(features)}")
    for i, (feature, width) in enumerate(zip(features, in_channels, strict=True)):
        check_map(name, f"features[{i}]", feature, width)
        if feature.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"{name}: features[{i}] must be of {features[0].shape[0]} images as features[0] is, "
                f"got {feature.shape[0]}"
            )


def read_labels(function: str, name: str, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """[N, H, W] labels as int64, and where they are in [0, K) and not ignored; on the CPU any other is an error."""
    _checks.labels(function, name, labels, "[N, H, W]")
    labels = labels.long()  # or -100 would equal 156 in uint8
    ignored = labels == ignore_index
    known = (labels >= 0) & (labels < num_classes) & ~ignored
    if labels.device.type == "cpu":
        wrong = labels[~(known | ignored)]
        if wrong.numel():
            raise ValueError(
                f"{function}: {name} must be in [0, {num_classes}) or ignore_index={ignore_index}, got {int(wrong[0])}"
            )
    return labels, known
