"""Small street-scene networks, one per row of MODELS: a strided residual backbone under a decoder of segops.nn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import segops.dupsampling
from segops.nn import ASPP, CAR, MSCAN, DUpsamplingDecoder, GALDHead, HFGDHead, SegNeXt


class StreetNet(nn.Module):
    """Segments images of any size; small enough to train on two CPU cores.

    Args:
        backbone: Image to feature maps, fine to coarse.
        decode_head: A decoder of segops.nn for those maps.
        context: Applied to the coarsest map.
    """

    def __init__(self, backbone: nn.Module, decode_head: nn.Module, context: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head
        self.context = context or nn.Identity()

    def features(self, image: Tensor) -> list[Tensor]:
        *fine, coarse = self.backbone(image)
        return [*fine, self.context(coarse)]

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] to raw logits at the decoder's output stride."""
        return self.decode_head(self.features(image))

    def loss(self, image: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        return self.decode_head.loss(self.features(image), target, ignore_index=ignore_index)

    def predict(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] to labels [N, H, W]."""
        return self.decode_head.predict(self.features(image), image.shape[2:])


def gald(num_classes: int, *, width: int, kernel_size: int, dilation: int, num_heads: int, border: str) -> StreetNet:
    """GALD at stride 8: pyramid pooling, then fused local distribution; logits at stride 4."""
    head = GALDHead(
        (width, 2 * width), num_classes, strides=(4, 8), channels=width, ga="psp", ld="v2", kernel_size=kernel_size,
        dilation=dilation, num_heads=num_heads, border=border, skip_channels=width // 2,
    )  # fmt: skip
    return StreetNet(Backbone((width // 2, width, 2 * width)), head)


def dupsampling(num_classes: int, *, width: int, dup_channels: int, learn_temperature: bool = True) -> StreetNet:
    """ASPP and everything after it at stride 16, the finer maps resized to it; logits for every pixel."""
    head = DUpsamplingDecoder(
        (width, 2 * width, width), num_classes, strides=(4, 8, 16), channels=width, low_channels=max(width // 2, 1),
        dup_channels=dup_channels, learn_temperature=learn_temperature,
    )  # fmt: skip
    # The rates of a crop of ten cells; DeepLab's 6, 12 and 18 would see nothing but the border.
    context = ASPP(2 * width, channels=width, rates=(1, 2, 4))
    return StreetNet(Backbone((width // 2, width, 2 * width), deep=2 * width), head, context)


def segnext(num_classes: int, *, size: str) -> StreetNet:
    """SegNeXt-T, -S, -B or -L, its bases fixed so that an image has one prediction; logits at stride 8."""
    model = SegNeXt(size, num_classes, bases="fixed")
    return StreetNet(Encoder(model.backbone, len(model.decode_head.in_channels)), model.decode_head)


class GuidedNet(StreetNet):
    """HFGD: CAR's losses, which hold no parameters, on the encoder of the head."""

    def loss(self, image: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        car = CAR(self.decode_head.num_classes, ignore_index=ignore_index)
        return self.decode_head.loss(self.features(image), target, ignore_index=ignore_index, car=car)


def hfgd(num_classes: int, *, backbone: str, output_stride: int) -> StreetNet:
    """HFGD: U-SFPN with axial attention, guided by the coarse branch; logits at stride 4 or 2."""
    encoder, widths = pyramid(backbone)
    return GuidedNet(encoder, HFGDHead(widths, num_classes, output_stride=output_stride))


def semanticfpn(num_classes: int, *, backbone: str) -> StreetNet:
    """Semantic FPN, HFGD's baseline; logits at stride 4."""
    encoder, widths = pyramid(backbone)
    head = HFGDHead(widths, num_classes, context=None, neck="sfpn", axial_heads=None, guided=False)
    return StreetNet(encoder, head)


def pyramid(name: str) -> tuple[Encoder, list[int]]:
    """A backbone by name, and the widths of its maps at strides 4 to 32.

    Args:
        name: mscan-t, -s, -b or -l, else a model of timm, whose weights are drawn and not downloaded.
    """
    if name.startswith("mscan-"):
        backbone: Any = MSCAN.variant(name.removeprefix("mscan-"))
        about = backbone.feature_info
    else:
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"the backbone {name} needs timm: pip install 'segops[models]'") from error
        except RuntimeError as error:  # of torchvision, where it was built for another torch
            raise ImportError(f"the backbone {name} needs timm, whose import failed: {error}") from error
        backbone = timm.create_model(name, pretrained=False, features_only=True)
        about = backbone.feature_info.get_dicts()
    widths = [each["num_chs"] for each in about if each["reduction"] >= 4]
    if [each["reduction"] for each in about][-len(widths) :] != [4, 8, 16, 32]:
        raise ValueError(f"the backbone {name} has no maps at strides 4, 8, 16 and 32")
    return Encoder(backbone, len(widths)), widths


def learn_w(model: StreetNet, labels: Iterable[Any], ignore_index: int) -> None:
    """Gives DUpsampling the principal components of the windows of label maps."""
    layer = model.decode_head.upsample
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
        options: The arguments of train.py that ``build`` takes.
        from_labels: Called once with the network, the label maps of the training set and the ignored label.
    """

    build: Callable[..., StreetNet]
    options: tuple[str, ...]
    from_labels: Callable[[StreetNet, Iterable[Any], int], None] | None = None


MODELS = {
    "gald": Model(gald, ("width", "kernel_size", "dilation", "num_heads", "border")),
    "dupsampling": Model(dupsampling, ("width", "dup_channels"), from_labels=learn_w),
    **{f"segnext-{size}": Model(partial(segnext, size=size), ()) for size in "tsbl"},
    **{f"hfgd-os{stride}": Model(partial(hfgd, output_stride=stride), ("backbone",)) for stride in (4, 2)},
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
    """Image to the last ``count`` maps of a backbone."""

    def __init__(self, backbone: nn.Module, count: int) -> None:
        super().__init__()
        self.normalize, self.backbone, self.count = Normalize(), backbone, count

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.backbone(self.normalize(image))[-self.count :]


class Backbone(nn.Module):
    """Image to features at strides 4 and 8, where the residual blocks are dilated 1, 2 and 4; and 16 if ``deep``."""

    def __init__(self, widths: tuple[int, int, int], deep: int | None = None) -> None:
        super().__init__()
        self.normalize = Normalize()
        stem, fine, coarse = widths
        self.fine = nn.Sequential(ConvBN(3, stem, stride=2), ConvBN(stem, fine, stride=2), Residual(fine))
        self.coarse = nn.Sequential(ConvBN(fine, coarse, stride=2), *(Residual(coarse, d) for d in (1, 2, 4)))
        self.deep = nn.Sequential(ConvBN(coarse, deep, stride=2), Residual(deep)) if deep else None

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
