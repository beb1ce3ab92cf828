"""HFGD: high-level features guide the training of the upsampling decoder (Huang et al., HFGD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ._layers import BilinearDecoder, check_features, check_map, conv_bn, init_glorot
from .aspp import ASPP
from .axial import AxialAttention2d
from .car import CAR
from .segnext import SegmentationModel, feature_info
from .self_attention import SelfAttention2d
from .semantic_fpn import SemanticFPN, UltraSemanticFPN

__all__ = ["HFGD", "CAEOutput", "ContextAugmentedEncoder", "HFGDHead"]

CONTEXTS = ("self_attention", "aspp")
NECKS: dict[str, type[SemanticFPN]] = {"usfpn": UltraSemanticFPN, "sfpn": SemanticFPN}


class CAEOutput(NamedTuple):
    """What :class:`ContextAugmentedEncoder` returns.

    Attributes:
        context: [N, channels, H, W], the linear map that CAR's losses are computed on.
        features: [N, out_channels, H, W], F_c of the paper.
    """

    context: Tensor
    features: Tensor


class ContextAugmentedEncoder(nn.Module):
    """CAE: the coarsest map with the context of the whole image, and the map of it that CAR regularises (3.2).

    ``b = leading(x)`` (two convolutions, BN, ReLU), ``s = b + attention(b)``, ``context = linear(s)`` (1x1, bias),
    ``features = trailing(context)`` (1x1, BN, ReLU).

    Args:
        in_channels: Width of the backbone's last map.
        channels: Width inside, and of ``context``.
        out_channels: Width of ``features``, that of the class kernels.
        qk_channels: Width of the attention's query and key.
        context: ``"self_attention"`` (:class:`SelfAttention2d`, added to b), ``"aspp"`` (:class:`ASPP`, in its place),
            or None (``s = b``): Table 1.
        kernel_size: Of the leading convolutions; 1 is better than 3 in the paper.
        norm_layer: Width to normalisation.

    Raises:
        ValueError: a width that is not positive, an unknown context, an even kernel; in forward, a map of another
            width.

    Children ``leading.{0,1}``, ``attention`` or ``aspp``, ``linear`` and ``trailing``, drawn from Glorot's uniform
    distribution.

    Example:
        >>> from segops.nn import ContextAugmentedEncoder
        >>> encoder = ContextAugmentedEncoder(128, channels=64, out_channels=32, qk_channels=8)
        >>> [tuple(x.shape) for x in encoder(torch.randn(2, 128, 9, 13))]
        [(2, 64, 9, 13), (2, 32, 9, 13)]
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int = 512,
        out_channels: int = 256,
        qk_channels: int = 64,
        context: str | None = "self_attention",
        kernel_size: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, width in (
            ("in_channels", in_channels),
            ("channels", channels),
            ("out_channels", out_channels),
            ("qk_channels", qk_channels),
        ):
            _checks.positive(name, argument, width)
        _checks.odd(name, "kernel_size", kernel_size)
        if context is not None:
            _checks.choice(name, "context", context, CONTEXTS)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.leading = nn.Sequential(
            conv_bn(in_channels, channels, kernel_size, norm_layer=norm_layer),
            conv_bn(channels, channels, kernel_size, norm_layer=norm_layer),
        )
        self.attention = SelfAttention2d(channels, qk_channels=qk_channels) if context == "self_attention" else None
        self.aspp = ASPP(channels, channels=channels, norm_layer=norm_layer) if context == "aspp" else None
        self.linear = nn.Conv2d(channels, channels, 1)
        self.trailing = conv_bn(channels, out_channels, 1, norm_layer=norm_layer)
        for module in (self.leading, self.linear, self.trailing):
            init_glorot(module)
        if self.aspp is not None:
            init_glorot(self.aspp)

    def forward(self, x: Tensor) -> CAEOutput:
        """[N, in_channels, H, W] to both maps."""
        check_map(type(self).__name__, "x", x, self.in_channels)
        x = self.leading(x)
        if self.attention is not None:
            x = x + self.attention(x)
        if self.aspp is not None:
            x = self.aspp(x)
        context = self.linear(x)
        return CAEOutput(context, self.trailing(context))


class HFGDHead(BilinearDecoder):
    """Decoder whose fine branch is trained towards the class kernels of the coarse one.

    The coarse branch, ``F_c = CAE(C5)`` and ``z_c = W F_c + b``, trains the backbone. The fine branch takes every map
    with its gradient cut, ``F_a = axial(USFPN(sg(C2), sg(C3), sg(C4), sg(F_c)))``, and its logits are
    ``z_u = sg(W) F_a + sg(b)``: it learns features that fit the class kernels W, and they never see it. Each parameter
    has a gradient from one cross-entropy alone:

    ==============================================  ======  ========  =====
    parameters                                      fine    coarse    CAR
    ==============================================  ======  ========  =====
    ``neck``, ``axial``                             yes     0         0
    ``classifier``, ``encoder.trailing``            0       yes       0
    the other ones of ``encoder``, the backbone     0       yes       yes
    ==============================================  ======  ========  =====

    Args:
        in_channels: Width of each feature map, fine to coarse.
        num_classes: K >= 2.
        strides: Stride of each map against the image, fine to coarse.
        output_stride: Of the logits: ``strides[0]``, or that over a power of two (4 or 2; 1 is possible).
        channels: Width of the neck, F_c and the class kernels.
        context_channels: Width inside the encoder.
        qk_channels: Width of its attention's query and key.
        context: ``"self_attention"`` or ``"aspp"``, see :class:`ContextAugmentedEncoder`; None leaves the encoder out
            (Identity in Table 1): the coarsest map enters the neck through a lateral, and nothing guides.
        neck: ``"usfpn"``, ``"sfpn"`` (:class:`UltraSemanticFPN`, :class:`SemanticFPN`), or None: the logits are those
            of the coarsest map, at its stride.
        axial_heads: Heads of the axial attention; None leaves it out.
        axial_layer: Width to a module in its place, such as ``AxialAttention2d.caa``; ``axial_heads`` is then unused.
        guided: False is a plain decoder: no gradient is cut, there is one classifier and one cross-entropy.
        class_bias: Bias b of the classifier.
        align_corners: Corner convention of every resize.
        norm_layer: Width to normalisation.

    Attributes:
        in_channels, strides, num_classes, output_stride: As given.

    Raises:
        ValueError: an unknown option, ``guided`` without encoder or neck, axial attention without neck, lists of
            different lengths; in forward, a wrong number or width of maps.

    Children ``encoder``, ``neck``, ``axial``, ``classifier``. Initialisation is iSeg's: Glorot's uniform distribution,
    biases 0. The authors run BatchNorm with eps 1e-3 and momentum 3e-4.

    Example:
        >>> from segops.nn import CAR, HFGDHead
        >>> head = HFGDHead((32, 64, 128), 19, strides=(4, 8, 16), channels=32, context_channels=64, output_stride=2)
        >>> features = [torch.randn(2, 32, 32, 48), torch.randn(2, 64, 16, 24), torch.randn(2, 128, 8, 12)]
        >>> head(features).shape
        torch.Size([2, 19, 64, 96])
        >>> target = torch.randint(0, 19, (2, 128, 192))
        >>> sorted(head.losses(features, target, car=CAR(19)))
        ['c2c', 'c2p', 'coarse', 'fine', 'intra']
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        output_stride: int = 4,
        channels: int = 256,
        context_channels: int = 512,
        qk_channels: int = 64,
        context: str | None = "self_attention",
        neck: str | None = "usfpn",
        axial_heads: int | None = 4,
        axial_layer: Callable[[int], nn.Module] | None = None,
        guided: bool = True,
        class_bias: bool = True,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(in_channels, num_classes, strides, align_corners)
        name = type(self).__name__
        if neck is not None:
            _checks.choice(name, "neck", neck, tuple(NECKS))
        if guided and (context is None or neck is None):
            raise ValueError(f"{name}: guided needs a context and a neck, got context={context!r} and neck={neck!r}")
        if axial_layer is None and axial_heads is not None:
            axial_layer = partial(AxialAttention2d, num_heads=axial_heads)
        if axial_layer is not None and neck is None:
            raise ValueError(f"{name}: axial attention needs a neck, got axial_heads={axial_heads} and neck=None")
        self.guided = guided
        *finer, coarsest = self.in_channels
        self.encoder: ContextAugmentedEncoder | None = None
        if context is not None:
            self.encoder = ContextAugmentedEncoder(
                coarsest, channels=context_channels, out_channels=channels, qk_channels=qk_channels, context=context,
                norm_layer=norm_layer,
            )  # fmt: skip
            coarsest = channels
        self.neck: SemanticFPN | None = None
        if neck is None:
            self.output_stride = self.strides[-1]
        else:
            self.neck = NECKS[neck](
                (*finer, coarsest), strides=self.strides, channels=channels, output_stride=output_stride,
                lateral_last=context is None, norm_layer=norm_layer, align_corners=align_corners,
            )  # fmt: skip
            self.output_stride, coarsest = output_stride, channels
        self.axial = None if axial_layer is None else axial_layer(channels)
        self.classifier = nn.Conv2d(coarsest, num_classes, 1, bias=class_bias)
        init_glorot(self.classifier)

    def forward(
        self, features: Sequence[Tensor], *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Raw logits, of the fine branch.

        Args:
            features: One map [N, in_channels[i], H_i, W_i] per entry of in_channels, fine to coarse, any sizes.
            return_aux: Also return the auxiliary outputs. Without it the coarse logits are not computed.

        Returns:
            logits [N, num_classes, H, W] at ``output_stride``; with ``return_aux`` also a dict: ``"coarse"``, logits
            [N, num_classes, H_last, W_last] of the guiding branch, where there is one, and ``"car_features"``
            [N, context_channels, H_last, W_last] for :class:`CAR`, where there is an encoder.
        """
        check_features(type(self).__name__, features, self.in_channels)
        *fine, x = features
        aux = {}
        if self.encoder is not None:
            context, x = self.encoder(x)
            aux["car_features"] = context
        if self.guided and return_aux:
            aux["coarse"] = self.classifier(x)
        if self.neck is not None:
            maps = [*fine, x]
            x = self.neck([each.detach() for each in maps] if self.guided else maps)
        if self.axial is not None:
            x = self.axial(x)
        logits = self._guided(x) if self.guided else self.classifier(x)
        return (logits, aux) if return_aux else logits

    def losses(
        self,
        features: Sequence[Tensor],
        target: Tensor,
        *,
        car: CAR | None = None,
        fine_weight: float = 1.0,
        coarse_weight: float = 1.0,
        **ce: Any,
    ) -> dict[str, Tensor]:
        """The terms of the loss, each times its weight.

        Args:
            features: As for :meth:`forward`.
            target: [N, H, W], integer labels, of any size from that of the coarsest map on.
            car: Regularises the encoder's linear map; None leaves it out.
            fine_weight: Factor on the cross-entropy of the fine logits. The branches share no parameter that both
                train, so the two factors are step sizes rather than a trade-off.
            coarse_weight: The same of the coarse ones.
            ce: Keywords of :func:`segops.upsample_cross_entropy`, for both.

        Returns:
            ``"fine"``, ``"coarse"`` where the head is guided, and ``"intra"``, ``"c2c"``, ``"c2p"`` with ``car``.

        Raises:
            ValueError: ``car`` without an encoder, of another number of classes, with another ``ignore_index`` than the
                cross-entropy, or beside ``reduction="none"``: its losses are not of pixels.
            TypeError: ``car`` is not a :class:`CAR`.
        """
        name = type(self).__name__
        if car is not None:
            _check_car(name, car, self, ce.get("ignore_index", 255))
            if ce.get("reduction") == "none":
                raise ValueError(f"{name}: car's losses are scalars, and reduction='none' gives one loss per pixel")
        logits, aux = self(features, return_aux=True)
        terms = {"fine": fine_weight * self.upsample.loss(logits, target, **ce)}
        if self.guided:
            terms["coarse"] = coarse_weight * self.upsample.loss(aux["coarse"], target, **ce)
        if car is not None:
            terms.update(car(aux["car_features"], target)._asdict())
        return terms

    def loss(self, features: Sequence[Tensor], target: Tensor, **options: Any) -> Tensor:
        """The sum of :meth:`losses`, which takes the same arguments."""
        return reduce(torch.add, self.losses(features, target, **options).values())

    def _guided(self, x: Tensor) -> Tensor:
        bias = self.classifier.bias
        return F.conv2d(x, self.classifier.weight.detach(), None if bias is None else bias.detach())


class HFGD(SegmentationModel):
    """A backbone under :class:`HFGDHead`, with :class:`CAR` on its encoder.

    Args:
        backbone: Image to maps, fine to coarse: :class:`MSCAN`, a timm model with ``features_only=True``, or any module
            that returns a list of maps.
        num_classes: K >= 2.
        in_channels: Width of the maps that the head takes; None means those at stride 4 and coarser of the backbone's
            ``feature_info``.
        strides: Their strides; None means those of ``feature_info``, else 4, 8, 16, 32.
        car: The regularisation: True (:class:`CAR` with its defaults), False, or a module; None means True where there
            is an encoder.
        ignore_index: Label of pixels without meaning, in every loss.
        fine_weight: Factor on the cross-entropy of the fine logits.
        coarse_weight: The same of the coarse ones.
        **head: Keywords of :class:`HFGDHead`.

    Raises:
        ValueError: neither ``in_channels`` nor ``feature_info``, a ``car`` that does not fit or has no encoder; what
            the head raises.
        TypeError: ``car`` is neither a bool nor a :class:`CAR`; in forward, a backbone that gives no list of maps.

    Children ``backbone``, ``decode_head`` and ``car``. What reaches the finer maps alone (of HRNet's branches, some
    convolutions of the last stage) has no gradient in a guided model: DistributedDataParallel then needs
    ``find_unused_parameters=True``.

    Example:
        >>> from segops.nn import HFGD, MSCAN
        >>> model = HFGD(MSCAN.variant("t"), 19, channels=32, context_channels=64)
        >>> image, target = torch.randn(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96))
        >>> model(image).shape, sorted(model(image, target)), model.predict(image).shape
        (torch.Size([2, 19, 64, 96]), ['c2c', 'c2p', 'coarse', 'fine', 'intra', 'loss'], torch.Size([2, 64, 96]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        in_channels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        car: CAR | bool | None = None,
        ignore_index: int = 255,
        fine_weight: float = 1.0,
        coarse_weight: float = 1.0,
        **head: Any,
    ) -> None:
        maps = feature_info(backbone)
        if in_channels is None:
            if not maps:
                raise ValueError(
                    f"{type(self).__name__}: in_channels must be given for a backbone without feature_info"
                )
            in_channels = [channels for channels, stride in maps if stride >= 4]
            strides = [stride for _, stride in maps if stride >= 4] if strides is None else strides
        strides = (4, 8, 16, 32) if strides is None else strides
        decode_head = HFGDHead(in_channels, num_classes, strides=strides, **head)
        super().__init__(backbone, decode_head)
        if car is None:
            car = decode_head.encoder is not None
        if car is True:
            car = CAR(num_classes, ignore_index=ignore_index)
        self.car = None if car is False else car
        if self.car is not None:
            _check_car(type(self).__name__, self.car, decode_head, ignore_index)
        self.ignore_index = ignore_index
        self.fine_weight, self.coarse_weight = fine_weight, coarse_weight

    def forward(self, image: Tensor, target: Tensor | None = None, **ce: Any) -> Tensor | dict[str, Tensor]:
        """Logits, or losses.

        Args:
            image: [N, C, H, W].
            target: [N, h, w] labels.
            **ce: Keywords of :func:`segops.upsample_cross_entropy`.

        Returns:
            Without a target, logits [N, K, H, W]. With one, a dict: ``loss`` and the terms of
            :meth:`HFGDHead.losses`, whose sum it is.
        """
        if target is None:
            return super().forward(image)
        maps = self._maps_of(self.decode_head, self._maps(image))
        head: Any = self.decode_head
        terms = head.losses(
            maps, target, car=self.car, fine_weight=self.fine_weight, coarse_weight=self.coarse_weight,
            **{"ignore_index": self.ignore_index, **ce},
        )  # fmt: skip
        return {"loss": reduce(torch.add, terms.values()), **terms}

    def loss(self, image: Tensor, target: Tensor, **ce: Any) -> Tensor:
        """The loss alone; arguments as for a call with a target."""
        losses: Any = self(image, target, **ce)
        return losses["loss"]


def _check_car(name: str, car: Any, head: HFGDHead, ignore_index: int) -> None:
    if not isinstance(car, CAR):
        raise TypeError(f"{name}: car must be a segops.nn.CAR, got {car!r}")
    if head.encoder is None:
        raise ValueError(f"{name}: car needs a head with a context, got context=None")
    if car.num_classes != head.num_classes:
        raise ValueError(f"{name}: car must be for the head's {head.num_classes} classes, got {car.num_classes}")
    if car.ignore_index != ignore_index:
        raise ValueError(
            f"{name}: car must have the ignore_index of the cross-entropy, {ignore_index}, got {car.ignore_index}"
        )
