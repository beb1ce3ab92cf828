"""The decoders of SegNeXt (3.2, Tables 5, 6): Light Hamburger, other contexts in its place, and SegFormer's MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops.axial_attention import axial_attention
from ..ops.nmf2d import GRADS, nmf2d
from ._layers import (
    BilinearDecoder,
    check_features,
    conv_bn,
    init_gaussian,
    resize,
)

__all__ = ["LightHamHead", "MLPHead"]

CONTEXTS = ("ham", "nl", "cc", "ema")
BASES = ("random", "fixed")
GROUP_NORM = partial(nn.GroupNorm, 32)


class LightHamHead(BilinearDecoder):
    """Decoder of SegNeXt: maps concatenated at the finest, squeezed, factorised, aligned, classified.

    ``s = squeeze(maps)``, ``m = relu(s + ham_out(NMF(relu(ham_in(s)))))``, ``logits = conv_seg(dropout(align(m)))``;
    the factorisation is :func:`segops.nmf2d`.

    Args:
        in_channels: Width of each feature map, fine to coarse.
        num_classes: K >= 2.
        strides: Stride of each map against the image, fine to coarse; None means the last is at 32, each finer one at
            half of the next.
        channels: Width inside the decoder: 256, 256, 512, 1024 for SegNeXt-T, -S, -B, -L.
        rank: Bases R of the factorisation: 16, 16, 64, 64.
        train_steps: Its iterations in training mode.
        eval_steps: The same in eval mode.
        grad: ``"unrolled"`` through all of them (SegNeXt), or ``"one_step"`` (HamNet).
        bases: ``"random"``: drawn anew at every call, as in the paper, whose published scores vary with the seed by 1
            to 2 points of mIoU. ``"fixed"``: drawn once from seed 0, the same on every machine and in no state_dict,
            which makes the model deterministic.
        context: ``"ham"``, or what Table 5 has in its place: ``"nl"`` (non-local), ``"cc"`` (criss-cross attention,
            recurrence 2), ``"ema"`` (expectation maximisation attention, 64 bases, 3 stages).
        dropout: Channel dropout before the classifier.
        norm_layer: Width to normalisation.
        align_corners: Corner convention of every resize.

    Attributes:
        in_channels, strides, num_classes: As given.
        output_stride: Stride of the logits, that of the finest map.

    Raises:
        ValueError: an unknown option, lists of different lengths; in forward, a wrong number or width of maps, bases
            or a generator without ``context="ham"``.

    Names are the official ones: ``squeeze.{conv,gn}``, ``hamburger.ham_in.conv``, ``hamburger.ham_out.{conv,gn}``,
    ``align.{conv,gn}``, ``conv_seg`` (drawn from N(0, 0.01)). Other contexts are called ``context``.

    Example:
        >>> from segops.nn import LightHamHead
        >>> head = LightHamHead((64, 160, 256), 19).eval()
        >>> features = [torch.randn(1, 64, 16, 24), torch.randn(1, 160, 8, 12), torch.randn(1, 256, 4, 6)]
        >>> head(features).shape, head.predict(features, (128, 192)).dtype
        (torch.Size([1, 19, 16, 24]), torch.uint8)
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        strides: Sequence[int] | None = None,
        channels: int = 256,
        rank: int = 16,
        train_steps: int = 6,
        eval_steps: int = 7,
        grad: str = "unrolled",
        bases: str = "random",
        context: str = "ham",
        dropout: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = GROUP_NORM,
        align_corners: bool = False,
    ) -> None:
        super().__init__(in_channels, num_classes, strides, align_corners)
        name = type(self).__name__
        for argument, size in (("channels", channels), ("rank", rank)):
            _checks.positive(name, argument, size)
        for argument, size in (("train_steps", train_steps), ("eval_steps", eval_steps)):
            _checks.integer(name, argument, size)
            _checks.number(name, argument, size, 0, 1000)
        _checks.choice(name, "grad", grad, GRADS)
        _checks.choice(name, "bases", bases, BASES)
        _checks.choice(name, "context", context, CONTEXTS)
        self.squeeze = conv_bn(sum(self.in_channels), channels, 1, norm_layer=norm_layer)
        if context == "ham":
            self.hamburger = _Hamburger(channels, rank, (train_steps, eval_steps), grad, bases, norm_layer)
        else:
            self.context = _OTHER_CONTEXTS[context](channels, norm_layer)
        self.align = conv_bn(channels, channels, 1, norm_layer=norm_layer)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.conv_seg.weight, std=0.01)

    def forward(
        self,
        features: Sequence[Tensor],
        *,
        bases: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Raw logits.

        Args:
            features: One map [N, in_channels[i], H_i, W_i] per entry of in_channels, fine to coarse.
            bases: [channels, rank] or [N, channels, rank], of columns of length 1, in place of the head's.
            generator: Draws the bases where they are random.
            return_aux: Also return the auxiliary outputs.

        Returns:
            logits [N, num_classes, H_0, W_0]; with ``return_aux`` also a dict, empty in this head.
        """
        check_features(type(self).__name__, features, self.in_channels)
        # Every map at the size of the finest.
        maps = [resize(x, features[0].shape[2:], self.align_corners) for x in features]
        x = self.squeeze(torch.cat(maps, 1))
        if hasattr(self, "hamburger"):
            x = self.hamburger(x, bases, generator)
        elif bases is None and generator is None:
            x = self.context(x)
        else:
            raise ValueError(f"{type(self).__name__}: bases and generator need context='ham'")
        logits = self.conv_seg(self.dropout(self.align(x)))
        return (logits, {}) if return_aux else logits


class MLPHead(BilinearDecoder):
    """Decoder (a) of Table 6, SegFormer's: every map through 1x1 conv, BN, ReLU, upsampled, concatenated, fused.

    Args:
        in_channels: Width of each feature map, fine to coarse.
        num_classes: K >= 2.
        strides: Stride of each map against the image, fine to coarse; None means the last is at 32, each finer one at
            half of the next.
        channels: Width inside the decoder.
        dropout: Channel dropout before the classifier.
        norm_layer: Width to normalisation.
        align_corners: Corner convention of every resize.

    Attributes:
        in_channels, strides, num_classes: As given.
        output_stride: Stride of the logits, that of the finest map.

    Names are mmsegmentation's: ``convs.{i}.{conv,bn}``, ``fusion_conv.{conv,bn}``, ``conv_seg``.

    Example:
        >>> from segops.nn import MLPHead
        >>> head = MLPHead((32, 64), 19, channels=48).eval()
        >>> head([torch.randn(1, 32, 16, 24), torch.randn(1, 64, 8, 12)]).shape
        torch.Size([1, 19, 16, 24])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        strides: Sequence[int] | None = None,
        channels: int = 256,
        dropout: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        align_corners: bool = False,
    ) -> None:
        super().__init__(in_channels, num_classes, strides, align_corners)
        _checks.positive(type(self).__name__, "channels", channels)
        self.convs = nn.ModuleList(conv_bn(width, channels, 1, norm_layer=norm_layer) for width in self.in_channels)
        self.fusion_conv = conv_bn(len(self.in_channels) * channels, channels, 1, norm_layer=norm_layer)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        init_gaussian(self.conv_seg, std=0.01)

    def forward(
        self, features: Sequence[Tensor], *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Raw logits [N, num_classes, H_0, W_0]; with ``return_aux`` also a dict, empty in this head."""
        check_features(type(self).__name__, features, self.in_channels)
        maps = [conv(x) for conv, x in zip(self.convs, features, strict=True)]
        maps = [resize(x, features[0].shape[2:], self.align_corners) for x in maps]
        logits = self.conv_seg(self.dropout(self.fusion_conv(torch.cat(maps, 1))))
        return (logits, {}) if return_aux else logits


class _Hamburger(nn.Module):
    """``relu(x + ham_out(NMF(relu(ham_in(x)))))``."""

    bases: Tensor | None

    def __init__(
        self,
        channels: int,
        rank: int,
        steps: tuple[int, int],
        grad: str,
        bases: str,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.rank, self.steps, self.grad = rank, steps, grad
        fixed = None
        if bases == "fixed":
            draw = torch.rand(channels, rank, generator=torch.Generator().manual_seed(0), device="cpu")
            fixed = F.normalize(draw, dim=0)
        self.register_buffer("bases", fixed, persistent=False)
        self.ham_in = nn.Sequential()
        self.ham_in.add_module("conv", nn.Conv2d(channels, channels, 1))
        self.ham_out = conv_bn(channels, channels, 1, activate=False, norm_layer=norm_layer)

    def forward(self, x: Tensor, bases: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if bases is None and generator is None:
            bases = self.bases
        steps = self.steps[0 if self.training else 1]
        h = nmf2d(self.ham_in(x).relu(), bases, rank=self.rank, steps=steps, grad=self.grad, generator=generator)
        return (x + self.ham_out(h)).relu()

    def extra_repr(self) -> str:
        bases = "random" if self.bases is None else "fixed"
        return f"rank={self.rank}, steps={self.steps}, grad={self.grad!r}, bases={bases!r}"


class _NonLocal(nn.Module):
    """``x + conv_out(attention)`` with keys, queries and values of half the width, scaled by its root (mmcv)."""

    def __init__(self, channels: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.conv_out = conv_bn(channels // 2, channels, 1, activate=False, norm_layer=norm_layer)
        for parameter in self.conv_out[1].parameters():  # the block begins as the identity
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (conv(x).flatten(2).mT for conv in (self.theta, self.phi, self.g))
        y = F.scaled_dot_product_attention(theta, phi, g)
        return x + self.conv_out(y.mT.unflatten(2, x.shape[2:]))


class _CrissCross(nn.Module):
    """Attention along a pixel's row and column, twice with the same weights (CCNet)."""

    def __init__(self, channels: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.once(x))

    def once(self, x: Tensor) -> Tensor:
        y = axial_attention(self.query(x), self.key(x), self.value(x), combine="joint", scale=1.0)
        return x + self.gamma * y


class _EMAttention(nn.Module):
    """Expectation maximisation attention: pixels rebuilt from bases that run after them (EMANet, mmsegmentation).

    Nothing of the iteration has a gradient; ``mid``, in front of it, is not trained.
    """

    bases: Tensor

    def __init__(
        self,
        channels: int,
        norm_layer: Callable[[int], nn.Module],
        *,
        rank: int = 64,
        stages: int = 3,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.stages, self.momentum = stages, momentum
        self.mid = nn.Conv2d(channels, channels, 1).requires_grad_(False)
        self.out = conv_bn(channels, channels, 1, activate=False, norm_layer=norm_layer)
        bases = torch.empty(channels, rank).normal_(std=(2 / rank) ** 0.5)
        self.register_buffer("bases", F.normalize(bases, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.out(self.rebuilt(x).relu())).relu()

    @torch.no_grad()
    def rebuilt(self, x: Tensor) -> Tensor:
        v = self.mid(x).flatten(2)  # [N, C, n]
        bases = self.bases.expand(x.shape[0], -1, -1)
        for _ in range(self.stages):
            z = (v.mT @ bases).softmax(2)
            bases = F.normalize(v @ F.normalize(z, p=1, dim=1), dim=1)
        if self.training:
            mean = bases.mean(0)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean)
            self.bases.lerp_(F.normalize(mean, dim=0).to(self.bases.dtype), self.momentum)
        return (bases @ z.mT).view_as(x)


_OTHER_CONTEXTS: dict[str, Callable[..., nn.Module]] = {"nl": _NonLocal, "cc": _CrissCross, "ema": _EMAttention}
