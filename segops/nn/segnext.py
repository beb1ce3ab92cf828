"""SegNeXt, and the model of any backbone and decoder (Guo et al., SegNeXt)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ._layers import resize
from .light_ham import LightHamHead, MLPHead
from .mscan import MSCAN, VARIANTS

__all__ = ["SegNeXt", "SegmentationModel"]

DECODERS = ("c", "a", "b")
# Width and rank of each size's decoder.
HEADS = {"t": (256, 16), "s": (256, 16), "b": (512, 64), "l": (1024, 64)}


def feature_info(backbone: nn.Module) -> list[tuple[int, int]]:
    """Width and stride of each map, of segops' list of dicts or of timm's FeatureInfo; empty where there is none."""
    info: Any = getattr(backbone, "feature_info", None) or []
    about = info if isinstance(info, list) else info.get_dicts()
    return [(each["num_chs"], each["reduction"]) for each in about]


class SegmentationModel(nn.Module):
    """A backbone under a decoder of the decoder contract.

    Args:
        backbone: Image to maps, fine to coarse; with timm's ``feature_info`` each head takes the maps at its strides,
            else it takes the last ``len(head.in_channels)``. Maps with the channels last (timm's Swin) are taken so.
        decode_head: Gives the logits.
        aux_head: Another decoder, for a loss in training.
        aux_weight: Factor on that loss.

    Raises:
        ValueError: a head asks for more maps than there are.
        TypeError: the backbone gives something else than a list of maps.

    Example:
        >>> from segops.nn import MSCAN, LightHamHead, SegmentationModel
        >>> model = SegmentationModel(MSCAN.variant("t"), LightHamHead((64, 160, 256), 19))
        >>> image, target = torch.randn(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96))
        >>> model(image).shape, sorted(model(image, target)), model.predict(image).shape
        (torch.Size([2, 19, 64, 96]), ['decode', 'loss'], torch.Size([2, 64, 96]))
    """

    def __init__(
        self, backbone: nn.Module, decode_head: nn.Module, *, aux_head: nn.Module | None = None, aux_weight: float = 0.4
    ) -> None:
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head
        self.aux_head, self.aux_weight = aux_head, aux_weight

    def forward(self, image: Tensor, target: Tensor | None = None, **ce: Any) -> Tensor | dict[str, Tensor]:
        """Logits, or losses.

        Args:
            image: [N, C, H, W].
            target: [N, h, w] labels of any size.
            **ce: Keywords of the heads' losses, such as ``ignore_index``.

        Returns:
            Without a target, logits [N, K, H, W]. With one, a dict: ``loss``, and the terms it is the weighted sum of,
            ``decode`` and, where there is an auxiliary head, ``aux``. No logits are made at the target's size.
        """
        if target is None:
            corners = getattr(self.decode_head, "align_corners", False)
            return resize(self.logits(image), image.shape[2:], corners)
        maps = self._maps(image)
        losses = {"decode": self._loss(self.decode_head, maps, target, ce)}
        total = losses["decode"]
        if self.aux_head is not None:
            losses["aux"] = self._loss(self.aux_head, maps, target, ce)
            total = total + self.aux_weight * losses["aux"]
        return {"loss": total, **losses}

    def logits(self, image: Tensor) -> Tensor:
        """The decoder's raw logits, not upsampled: what :func:`segops.upsample_argmax` takes of several views."""
        head: Any = self.decode_head
        return head(self._maps_of(head, self._maps(image)))

    @torch.no_grad()
    def predict(self, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Labels [N, *size] (None: the image's), uint8 for up to 255 classes."""
        head: Any = self.decode_head
        size = (image.shape[2], image.shape[3]) if size is None else size
        return head.predict(self._maps_of(head, self._maps(image)), size)

    def _maps(self, image: Tensor) -> Sequence[Tensor]:
        """The backbone's, [N, C, H, W] each."""
        maps = self.backbone(image)
        if not isinstance(maps, Sequence) or not all(isinstance(x, Tensor) and x.dim() == 4 for x in maps):
            got = [tuple(x.shape) for x in maps] if isinstance(maps, Sequence) else tuple(getattr(maps, "shape", ()))
            raise TypeError(
                f"{type(self).__name__}: the backbone must give a list of maps [N, C, H, W] (timm: "
                f"features_only=True), got {type(maps).__name__} {got}"
            )
        layout = getattr(self.backbone, "output_fmt", None)
        if getattr(layout, "value", layout) == "NHWC":
            return [x.permute(0, 3, 1, 2) for x in maps]
        return maps

    def _loss(self, head: Any, maps: Sequence[Tensor], target: Tensor, ce: dict[str, Any]) -> Tensor:
        return head.loss(self._maps_of(head, maps), target, **ce)

    def _maps_of(self, head: Any, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        wanted = len(head.in_channels)
        if len(maps) < wanted:
            raise ValueError(f"{type(self).__name__}: {type(head).__name__} takes {wanted} maps, there are {len(maps)}")
        info = feature_info(self.backbone)
        if len(info) == len(maps):
            at = [x for x, (_, stride) in zip(maps, info, strict=True) if stride in head.strides]
            if len(at) == wanted:
                return at
        return list(maps)[-wanted:]


class SegNeXt(SegmentationModel):
    """SegNeXt-T, -S, -B or -L: :class:`MSCAN` under :class:`LightHamHead`, and the paper's ablations.

    Args:
        variant: ``"t"``, ``"s"``, ``"b"`` or ``"l"``.
        num_classes: K >= 2.
        in_chans: Channels of the image.
        decoder: Of Table 6: ``"c"``, Light Hamburger over the last three stages; ``"a"``, SegFormer's MLP over all
            four, 256 wide; ``"b"``, Light Hamburger over the last stage.
        with_stage1: Decoder (c) over all four stages, at stride 4.
        context: Of Table 5: ``"ham"``, ``"nl"``, ``"cc"`` or ``"ema"``, see :class:`LightHamHead`.
        attention: Of Table 7: ``"msca"`` or ``"lka"``, see :class:`MSCAN`.
        drop_path_rate: None means the paper's 0.1, for SegNeXt-L 0.3.
        norm_layer: Width to normalisation in the backbone. The official models train with ``nn.SyncBatchNorm``.
        grad: Of the factorisation, see :class:`LightHamHead`.
        bases: The same.

    Raises:
        ValueError: an unknown option, or options that exclude each other.

    Children ``backbone`` and ``decode_head`` with the official parameter names: a ``state_dict`` of the authors or of
    mmsegmentation 0.x loads with ``strict=True``. :func:`segops.nn.official_state_dict` converts other files.

    Example:
        >>> from segops.nn import SegNeXt
        >>> model = SegNeXt("t", num_classes=19).eval()
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 19, 64, 96])
    """

    def __init__(
        self,
        variant: str = "t",
        num_classes: int = 150,
        *,
        in_chans: int = 3,
        decoder: str = "c",
        with_stage1: bool = False,
        context: str = "ham",
        attention: str = "msca",
        drop_path_rate: float | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        grad: str = "unrolled",
        bases: str = "random",
    ) -> None:
        name = type(self).__name__
        _checks.choice(name, "variant", variant, tuple(VARIANTS))
        _checks.choice(name, "decoder", decoder, DECODERS)
        if decoder != "c" and with_stage1:
            raise ValueError(f"{name}: with_stage1 needs decoder='c', got {decoder!r}")
        if decoder == "a" and context != "ham":
            raise ValueError(f"{name}: decoder='a' has no context, got context={context!r}")
        overrides: dict[str, Any] = {"in_chans": in_chans, "attention": attention, "norm_layer": norm_layer}
        if drop_path_rate is not None:
            overrides["drop_path_rate"] = drop_path_rate
        backbone = MSCAN.variant(variant, **overrides)
        first = 3 if decoder == "b" else 0 if with_stage1 or decoder == "a" else 1
        widths = [about["num_chs"] for about in backbone.feature_info[first:]]
        channels, rank = HEADS[variant]
        head: nn.Module
        if decoder == "a":
            head = MLPHead(widths, num_classes)
        else:
            head = LightHamHead(
                widths, num_classes, channels=channels, rank=rank, grad=grad, bases=bases, context=context
            )
        super().__init__(backbone, head)
