"""A small street-scene network: strided residual backbone, GALD decoder with fused local distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segops.nn import GALDHead


class StreetNet(nn.Module):
    """Segments images of any size; small enough to train on two CPU cores.

    Args:
        num_classes: K.
        width: Channels at stride 8 and inside the decoder.
        kernel_size: Taps per axis of the local distribution.
        dilation: Distance between its taps at stride 8.
        num_heads: Its heads.
        border: Its border rule.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 64,
        kernel_size: int = 5,
        dilation: int = 3,
        num_heads: int = 1,
        border: str = "zero",
    ) -> None:
        super().__init__()
        self.backbone = Backbone((width // 2, width, 2 * width))
        self.decode_head = GALDHead(
            (width, 2 * width), num_classes, strides=(4, 8), channels=width, ga="psp", ld="v2",
            kernel_size=kernel_size, dilation=dilation, num_heads=num_heads, border=border, skip_channels=width // 2,
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] to raw logits [N, K, ceil(H/4), ceil(W/4)]."""
        return self.decode_head(self.backbone(image))

    def loss(self, image: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return self.decode_head.loss(self.backbone(image), target, ignore_index=ignore_index)

    def predict(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] to labels [N, H, W]."""
        return self.decode_head.predict(self.backbone(image), image.shape[2:])


class Backbone(nn.Module):
    """Image to features at strides 4 and 8; the residual blocks at stride 8 are dilated 1, 2 and 4."""

    mean: Tensor
    std: Tensor

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        stem, fine, coarse = widths
        self.fine = nn.Sequential(ConvBN(3, stem, stride=2), ConvBN(stem, fine, stride=2), Residual(fine))
        self.coarse = nn.Sequential(ConvBN(fine, coarse, stride=2), *(Residual(coarse, d) for d in (1, 2, 4)))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine((image - self.mean) / self.std)
        return fine, self.coarse(fine)


class ConvBN(nn.Module):
    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Residual(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = ConvBN(channels, channels, dilation=dilation)
        self.second = ConvBN(channels, channels, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))
