"""Small street-scene networks, one per row of MODELS: a strided residual backbone under a decoder of segops.nn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import segops.dupsampling
from segops.nn import ASPP, HFGD, MSCAN, DUpsamplingDecoder, GALDHead, SegmentationModel, SegNeXt


def gald(
    num_classes: int, *, width: int, kernel_size: int, dilation: int, num_heads: int, border: str
) -> SegmentationModel:
    """GALD at stride 8: pyramid pooling, then fused local distribution; logits at stride 4."""
    head = GALDHead(
        (width, 2 * width), num_classes, strides=(4, 8), channels=width, ga="psp", ld="v2", kernel_size=kernel_size,
        dilation=dilation, num_heads=num_heads, border=border, skip_channels=width // 2,
    )  # fmt: skip
    return SegmentationModel(Backbone((width // 2, width, 2 * width)), head)


def dupsampling(
    num_classes: int, *, width: int, dup_channels: int, learn_temperature: bool = True
) -> SegmentationModel:
    """ASPP and everything after it at stride 16, the finer maps resized to it; logits for every pixel."""
    head = DUpsamplingDecoder(
        (width, 2 * width, width), num_classes, strides=(4, 8, 16), channels=width, low_channels=max(width // 2, 1),
        dup_channels=dup_channels, learn_temperature=learn_temperature,
    )  # fmt: skip
    # The rates of a crop of ten cells; DeepLab's 6, 12 and 18 would see nothing but the border.
    deep = nn.Sequential(
        ConvBN(2 * width, 2 * width, stride=2), Residual(2 * width), ASPP(2 * width, channels=width, rates=(1, 2, 4))
    )
    return SegmentationModel(Backbone((width // 2, width, 2 * width), deep), head)


def segnext(num_classes: int, *, size: str) -> SegmentationModel:
    """SegNeXt-T, -S, -B or -L, its bases fixed so that an image has one prediction; logits at stride 8."""
    model = SegNeXt(size, num_classes, bases="fixed")
    return SegmentationModel(Encoder(model.backbone), model.decode_head)


def hfgd(num_classes: int, *, backbone: str, output_stride: int, ignore_index: int = 255) -> HFGD:
    """HFGD: U-SFPN with axial attention, guided by the coarse branch; logits at stride 4 or 2."""
    return HFGD(encoder(backbone), num_classes, output_stride=output_stride, ignore_index=ignore_index)


def semanticfpn(num_classes: int, *, backbone: str) -> HFGD:
    """Semantic FPN, HFGD's baseline; logits at stride 4."""
    return HFGD(encoder(backbone), num_classes, context=None, neck="sfpn", axial_heads=None, guided=False)


def encoder(name: str) -> Encoder:
    """A backbone by name: mscan-t, -s, -b or -l, or a model of timm, whose weights are drawn and not downloaded."""
    if name.startswith("mscan-"):
        return Encoder(MSCAN.variant(name.removeprefix("mscan-")))
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the backbone {name} needs timm: pip install 'segops[models]'") from error
    except RuntimeError as error:  # of torchvision, where it was built for another torch
        raise ImportError(f"the backbone {name} needs timm, whose import failed: {error}") from error
    if not timm.is_model(name):
        raise ValueError(f"the backbone must be mscan-t, -s, -b, -l or a model of timm, got {name!r}")
    return Encoder(timm.create_model(name, pretrained=False, features_only=True))


def learn_w(model: SegmentationModel, labels: Iterable[Any], ignore_index: int) -> None:
    """Gives DUpsampling the principal components of the windows of label maps."""
    layer: Any = model.decode_head.upsample
    layer.load_fit(
        segops.dupsampling.fit(
            labels, layer.num_classes, layer.scale_factor, layer.in_channels, ignore_index=ignore_index
        )
    )


@dataclass(frozen=True)
class Model:
    """What train.py must know of a network.

    Attributes:
        build: (num_classes, **options) to the network.
        options: What ``build`` takes of the arguments of train.py; ``ignore_index`` is that of the data.
        from_labels: Called once with the network, the label maps of the training set and the ignored label.
    """

    build: Callable[..., SegmentationModel]
    options: tuple[str, ...]
    from_labels: Callable[[SegmentationModel, Iterable[Any], int], None] | None = None


MODELS = {
    "gald": Model(gald, ("width", "kernel_size", "dilation", "num_heads", "border")),
    "dupsampling": Model(dupsampling, ("width", "dup_channels"), from_labels=learn_w),
    **{f"segnext-{size}": Model(partial(segnext, size=size), ()) for size in "tsbl"},
    **{f"hfgd-os{n}": Model(partial(hfgd, output_stride=n), ("backbone", "ignore_index")) for n in (4, 2)},
    "semanticfpn": Model(semanticfpn, ("backbone",)),
}


class Normalize(nn.Module):
    """[0, 1] to the mean and deviation of ImageNet."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class Encoder(nn.Module):
    """A backbone for images in [0, 1]; what it says of its maps is passed on."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.normalize, self.backbone = Normalize(), backbone
        self.feature_info, self.output_fmt = backbone.feature_info, getattr(backbone, "output_fmt", None)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.backbone(self.normalize(image))


class Backbone(nn.Module):
    """Image to features at strides 4 and 8, where the residual blocks are dilated 1, 2 and 4; then ``deep``."""

    def __init__(self, widths: tuple[int, int, int], deep: nn.Module | None = None) -> None:
        super().__init__()
        self.normalize = Normalize()
        stem, fine, coarse = widths
        self.fine = nn.Sequential(ConvBN(3, stem, stride=2), ConvBN(stem, fine, stride=2), Residual(fine))
        self.coarse = nn.Sequential(ConvBN(fine, coarse, stride=2), *(Residual(coarse, d) for d in (1, 2, 4)))
        self.deep = deep

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        fine = self.fine(self.normalize(image))
        coarse = self.coarse(fine)
        return (fine, coarse) if self.deep is None else (fine, coarse, self.deep(coarse))


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
