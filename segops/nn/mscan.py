"""MSCAN, the encoder of SegNeXt: convolutional attention from multi-scale strips (Guo et al., SegNeXt, 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.msca import msca
from ._layers import check_map

__all__ = ["MSCA", "MSCAN"]

ATTENTIONS = ("msca", "lka")
# Embedding widths, depths, drop path rate of each size; MLP ratios are 8, 8, 4, 4.
VARIANTS: dict[str, dict[str, Any]] = {
    "t": {"embed_dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2), "drop_path_rate": 0.1},
    "s": {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2), "drop_path_rate": 0.1},
    "b": {"embed_dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3), "drop_path_rate": 0.1},
    "l": {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3), "drop_path_rate": 0.3},
}


class MSCA(nn.Module):
    """Multi-scale convolutional attention: ``(W3 (a + strips of a) + b3) * x`` with ``a`` a depthwise 5x5 of x.

    One call of :func:`segops.msca`: no intermediate map of the strips exists.

    Args:
        channels: Width of x and of the output.
        strip_lengths: Odd length of each pair of strips, 1 x k and then k x 1.

    Raises:
        ValueError: a width below 1 or an even strip; in forward, an x of another width.

    Parameters are the official ones: ``conv0`` [C, 1, 5, 5], ``conv{i}_1`` [C, 1, 1, k_i], ``conv{i}_2``
    [C, 1, k_i, 1] and, whatever the number of pairs, ``conv3`` [C, C, 1, 1], each with a bias. Initialisation is
    PyTorch's.

    Example:
        >>> from segops.nn import MSCA
        >>> MSCA(64)(torch.randn(2, 64, 32, 48)).shape
        torch.Size([2, 64, 32, 48])
    """

    def __init__(self, channels: int, strip_lengths: Sequence[int] = (7, 11, 21)) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.positive(name, "channels", channels)
        self.channels, self.strip_lengths = channels, tuple(strip_lengths)
        self.conv0 = _depthwise(channels, 5)
        for i, length in enumerate(strip_lengths):
            k, _ = _checks.pair(name, f"strip_lengths[{i}]", length, odd=True)
            setattr(self, f"conv{i}_1", _depthwise(channels, (1, k)))
            setattr(self, f"conv{i}_2", _depthwise(channels, (k, 1)))
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to the same shape."""
        check_map(type(self).__name__, "x", x, self.channels)
        strips = []
        for i in range(len(self.strip_lengths)):
            row, column = getattr(self, f"conv{i}_1"), getattr(self, f"conv{i}_2")
            strips.append((row.weight, row.bias, column.weight, column.bias))
        return msca(x, self.conv0.weight, self.conv0.bias, strips, self.conv3.weight, self.conv3.bias)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, strip_lengths={self.strip_lengths}"


class _LKA(nn.Module):
    """Large kernel attention (VAN), the ablation of Table 7: one dilated 7x7 instead of the strips."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = _depthwise(channels, 5)
        self.conv_spatial = _depthwise(channels, 7, dilation=3)
        self.conv1 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv_spatial(self.conv0(x))) * x


class _SpatialAttention(nn.Module):
    def __init__(self, channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = attention
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))


class _DepthwiseConv(nn.Module):
    """Nothing but a level in the official names: ``mlp.dwconv.dwconv``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = _depthwise(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class _MLP(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = _DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x))
        # In place: a fresh map of this size costs more than its GELU.
        x = self.act(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)
        return self.fc2(x)


class _Block(nn.Module):
    """``x + scale * branch(norm(x))`` twice, each branch dropped for a sample with probability ``drop_path``."""

    def __init__(
        self,
        channels: int,
        mlp_ratio: float,
        drop_path: float,
        attention: nn.Module,
        layer_scale_init: float,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = norm_layer(channels)
        self.attn = _SpatialAttention(channels, attention)
        self.norm2 = norm_layer(channels)
        self.mlp = _MLP(channels, int(channels * mlp_ratio))
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), layer_scale_init))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self._scale(self.layer_scale_1, x), self.attn(self.norm1(x)))
        return torch.addcmul(x, self._scale(self.layer_scale_2, x), self.mlp(self.norm2(x)))

    def _scale(self, scale: Tensor, x: Tensor) -> Tensor:
        scale = scale[:, None, None]
        if not self.training or self.drop_path == 0:
            return scale
        keep = 1 - self.drop_path
        return scale * (x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:.3g}"


class _PatchEmbed(nn.Module):
    """Halves the resolution."""

    def __init__(self, in_channels: int, channels: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.norm = norm_layer(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class _Stem(nn.Module):
    """Halves the resolution twice."""

    def __init__(self, in_channels: int, channels: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1),
            norm_layer(channels // 2),
            nn.GELU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1),
            norm_layer(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class MSCAN(nn.Module):
    """The multi-scale convolutional attention network: image to four maps at strides 4, 8, 16 and 32.

    Args:
        embed_dims: Width of each of the four stages.
        depths: Blocks of each stage.
        mlp_ratios: Hidden width of each stage's MLP over its width.
        in_chans: Channels of the image.
        drop_path_rate: Probability of dropping a branch of the last block for a sample; it grows linearly from 0.
        strip_lengths: Of :class:`MSCA`.
        attention: ``"msca"``, or ``"lka"``: one dilated 7x7 in place of the strips (Table 7's "w/o MSCA").
        layer_scale_init: Initial factor on each branch.
        norm_layer: Width to normalisation, of blocks, stem and downsampling. The official models train with
            ``nn.SyncBatchNorm``.

    Attributes:
        feature_info: Of each map, as timm's: ``num_chs``, ``reduction`` (stride), ``module``.

    Raises:
        ValueError: tuples that are not of four entries, an unknown attention, rates out of range; in forward, an image
            of another number of channels.

    Every stage ends in a LayerNorm over channels, whose output is the stage's map and the next stage's input. Maps are
    channels_last. Parameter names are the official ones: ``patch_embed1.proj.{0,1,3,4}``,
    ``patch_embed{i}.{proj,norm}``, ``block{i}.{j}.{norm1,norm2,attn,mlp,layer_scale_1,layer_scale_2}``, ``norm{i}``.
    Convolutions are drawn from N(0, sqrt(2 / fan_out)).

    Example:
        >>> from segops.nn import MSCAN
        >>> [tuple(x.shape) for x in MSCAN.variant("t")(torch.randn(1, 3, 64, 96))]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (3, 3, 5, 2),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        *,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        strip_lengths: Sequence[int] = (7, 11, 21),
        attention: str = "msca",
        layer_scale_init: float = 1e-2,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("embed_dims", embed_dims), ("depths", depths), ("mlp_ratios", mlp_ratios)):
            if len(value) != 4:
                raise ValueError(f"{name}: {argument} must have one entry per stage (4), got {tuple(value)}")
        for argument, sizes in (("embed_dims", embed_dims), ("depths", depths)):
            for i, size in enumerate(sizes):
                _checks.positive(name, f"{argument}[{i}]", size)
        _checks.positive(name, "in_chans", in_chans)
        _checks.number(name, "drop_path_rate", drop_path_rate, 0.0, 0.999)
        _checks.choice(name, "attention", attention, ATTENTIONS)
        self.in_chans = in_chans
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": 4 << i, "module": f"norm{i + 1}"} for i, width in enumerate(embed_dims)
        ]
        total = sum(depths)
        rates = iter(drop_path_rate * i / max(total - 1, 1) for i in range(total))
        for i, (width, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True)):
            embed = _PatchEmbed(embed_dims[i - 1], width, norm_layer) if i else _Stem(in_chans, width, norm_layer)
            blocks = [
                _Block(
                    width,
                    ratio,
                    next(rates),
                    MSCA(width, strip_lengths) if attention == "msca" else _LKA(width),
                    layer_scale_init,
                    norm_layer,
                )
                for _ in range(depth)
            ]
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(width))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def variant(cls, size: str, **overrides: Any) -> MSCAN:
        """MSCAN-T, -S, -B or -L of the paper's Table 2.

        Args:
            size: ``"t"``, ``"s"``, ``"b"`` or ``"l"``.
            **overrides: Constructor arguments that differ.

        Raises:
            ValueError: an unknown size.
        """
        _checks.choice(f"{cls.__name__}.variant", "size", size, tuple(VARIANTS))
        return cls(**{**VARIANTS[size], **overrides})

    def forward(self, image: Tensor) -> list[Tensor]:
        """[N, in_chans, H, W] to four maps [N, embed_dims[i], H / 2^(i+2), W / 2^(i+2)], sizes rounded up."""
        check_map(type(self).__name__, "image", image, self.in_chans)
        # Depthwise 3x3 convolutions, of torch, take up to 17 times as long in NCHW; the attention is as fast in both.
        maps, x = [], image.contiguous(memory_format=torch.channels_last)
        for i in range(1, 5):
            x = getattr(self, f"block{i}")(getattr(self, f"patch_embed{i}")(x))
            x = getattr(self, f"norm{i}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps


def _depthwise(channels: int, kernel_size: int | tuple[int, int], dilation: int = 1) -> nn.Conv2d:
    """Padded so that it keeps the size."""
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    padding = (dilation * (height // 2), dilation * (width // 2))
    return nn.Conv2d(channels, channels, (height, width), padding=padding, dilation=dilation, groups=channels)
