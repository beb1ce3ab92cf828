"""The label autoencoder: how much of a label map survives a low resolution (DUpsampling, 4.1.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ._layers import BilinearUpsampling, check_classes, conv_bn, init_gaussian, read_labels
from .dupsampling import UPSAMPLERS, DUpsampling

__all__ = ["LabelAutoencoder"]


class LabelAutoencoder(nn.Module):
    """Label maps through five strided 3x3 convolutions and back: the upper bound mIOU* of the paper's Table 1.

    The paper leaves widths, normalisation and the way to stride 16 open; here the fifth convolution has stride 1 then.
    The input is one-hot, zero at ignored pixels. It is never formed: the first convolution sums rows of its weight.

    Args:
        num_classes: K >= 2.
        output_stride: 32 or 16.
        upsampler: ``"dup"`` or ``"bilinear"``.
        dup_channels: Width of the map that DUpsampling decodes.
        align_corners: Corner convention of the bilinear one.
        norm_layer: Width to normalisation.

    Attributes:
        upsample: The :class:`DUpsampling`; ``upsample.load_fit`` gives it a W learned from labels.

    Raises:
        ValueError: a choice that is not offered; in a call, a label map that is not [N, H, W] or (on the CPU) a label
            outside [0, K).

    Example:
        >>> from segops.nn import LabelAutoencoder
        >>> labels = torch.randint(0, 11, (2, 90, 120), dtype=torch.uint8)
        >>> model = LabelAutoencoder(11, output_stride=16)
        >>> model(labels).shape, model.loss(labels).shape, model.predict(labels).shape
        (torch.Size([2, 11, 90, 120]), torch.Size([]), torch.Size([2, 90, 120]))
    """

    def __init__(
        self,
        num_classes: int,
        *,
        output_stride: int = 32,
        upsampler: str = "dup",
        dup_channels: int = 64,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_classes(name, num_classes)
        _checks.choice(name, "upsampler", upsampler, UPSAMPLERS)
        if output_stride not in (32, 16):
            raise ValueError(f"{name}: output_stride must be 32 or 16, got {output_stride}")
        self.num_classes, self.output_stride, self.upsampler = num_classes, output_stride, upsampler
        widths = (num_classes, 64, 128, 256, 256, 256)
        strides = (2, 2, 2, 2, output_stride // 16)
        self.stem, *stages = (
            conv_bn(a, b, 3, stride=stride, norm_layer=norm_layer)
            for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.stages = nn.Sequential(*stages)
        self.project = nn.Conv2d(widths[-1], dup_channels if upsampler == "dup" else num_classes, 1)
        init_gaussian(self)
        self.upsample: DUpsampling | BilinearUpsampling
        if upsampler == "dup":
            self.upsample = DUpsampling(dup_channels, num_classes, output_stride)
        else:
            self.upsample = BilinearUpsampling(align_corners)

    def encode(self, labels: Tensor, ignore_index: int = 255) -> Tensor:
        """[N, H, W] integer labels to what the upsampling gets, [N, dup_channels or K, h, w]."""
        labels, known = read_labels(type(self).__name__, "labels", labels, self.num_classes, ignore_index)
        x = self.stem[1:](_one_hot_conv(labels, known, self.stem.get_parameter("conv.weight")))
        return self.project(self.stages(x))

    def forward(self, labels: Tensor, ignore_index: int = 255) -> Tensor:
        """Raw logits [N, K, H, W] of labels [N, H, W], uint8, int16, int32 or int64."""
        return self.upsample(self.encode(labels, ignore_index), (labels.shape[1], labels.shape[2]))

    def loss(self, labels: Tensor, ignore_index: int = 255, **ce: Any) -> Tensor:
        """Cross-entropy of the logits against the labels themselves; ``ce`` as for the decoder's loss."""
        return self.upsample.loss(self.encode(labels, ignore_index), labels, ignore_index=ignore_index, **ce)

    @torch.no_grad()
    def predict(self, labels: Tensor, ignore_index: int = 255) -> Tensor:
        """The labels that come back, [N, H, W], uint8 for up to 255 classes."""
        return self.upsample.predict(self.encode(labels, ignore_index), (labels.shape[1], labels.shape[2]))


def _one_hot_conv(labels: Tensor, known: Tensor, weight: Tensor) -> Tensor:
    """``conv2d(one_hot(labels), weight, stride=2, padding=1)`` for a 3x3 kernel, without the one-hot map."""
    channels, classes = weight.shape[:2]
    nothing = 9 * classes
    table = torch.cat([weight.permute(2, 3, 1, 0).reshape(nothing, channels), weight.new_zeros(1, channels)])
    padded = F.pad(labels.masked_fill(~known, nothing), (1, 1, 1, 1), value=nothing)
    taps = padded.unfold(1, 3, 2).unfold(2, 3, 2)
    n, h, w = taps.shape[:3]
    rows = taps.reshape(n * h * w, 9) + torch.arange(0, nothing, classes, device=labels.device)
    out = F.embedding_bag(rows.clamp(max=nothing), table, mode="sum", padding_idx=nothing)
    return out.view(n, h, w, channels).permute(0, 3, 1, 2)
