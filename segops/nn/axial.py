"""Axial attention as a layer: the multi-head form (iSeg), the likely one in HFGD, and that of CAA."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.axial_attention import axial_attention, check_mode
from ._layers import check_map, init_glorot

__all__ = ["AxialAttention2d"]

MERGES = ("concat", "interleaved")


class AxialAttention2d(nn.Module):
    """Attention along the height and along the width, q, k and v by 1x1 convolutions of x.

    The defaults are iSeg's multi-head form, ``AxialAttention2d.caa`` is that of CAA and CAR. No position embedding, no
    projection of the result.

    Args:
        in_channels: Width of x.
        out_channels: Width of value and of the result; None means ``in_channels``.
        qk_channels: Width of query and key; None means ``in_channels``.
        num_heads: Heads that query, key and value are split into.
        scale: Factor on the logits; None means 1 / sqrt(qk_channels / num_heads).
        combine: ``"compose"``, ``"sum"`` or ``"joint"``, see :func:`segops.axial_attention`.
        order: Axes in their order, see there.
        tie_qk: Query and key are one tensor.
        qk_per_axis: Query and key of their own for each axis of ``order``; not with ``combine="joint"``.
        bias: Biases in the convolutions.
        norm_layer: Width to normalisation, after each convolution; None means none.
        act_layer: Activation after that; None means none.
        merge: How the heads' results are put together: ``"concat"``, or ``"interleaved"``, channel c of head h at
            ``c * num_heads + h``, which iSeg's weights expect of the layers behind.
        residual: Add x to the result.

    Raises:
        ValueError: widths that are not positive or not multiples of ``num_heads``, a scale that is not finite, an
            unknown option, options that exclude each other, ``residual`` with ``out_channels`` other than
            ``in_channels``; in forward, a map of another width.
        TypeError: a scale that is no number, an order that is no sequence.

    Children ``value`` and ``query``, ``key`` (``query_key`` if tied); with ``qk_per_axis`` ``query_height`` and so on.
    Each is a convolution, or ``.conv``, ``.bn`` (``.gn`` for a GroupNorm) and ``.act``. Glorot's uniform distribution,
    query and key equal.

    Example:
        >>> from segops.nn import AxialAttention2d
        >>> AxialAttention2d(64, num_heads=4)(torch.randn(2, 64, 33, 47)).shape
        torch.Size([2, 64, 33, 47])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        qk_channels: int | None = None,
        num_heads: int = 4,
        scale: float | None = None,
        combine: str = "compose",
        order: Sequence[str] = ("height", "width"),
        tie_qk: bool = False,
        qk_per_axis: bool = False,
        bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        merge: str = "concat",
        residual: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        out_channels = in_channels if out_channels is None else out_channels
        qk_channels = in_channels if qk_channels is None else qk_channels
        for argument, width in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("qk_channels", qk_channels),
            ("num_heads", num_heads),
        ):
            _checks.positive(name, argument, width)
        for argument, width in (("out_channels", out_channels), ("qk_channels", qk_channels)):
            if width % num_heads:
                raise ValueError(f"{name}: {argument} must be a multiple of num_heads={num_heads}, got {width}")
        check_mode(name, scale, combine, order)
        _checks.choice(name, "merge", merge, MERGES)
        if combine == "joint" and qk_per_axis:
            raise ValueError(f"{name}: combine='joint' excludes qk_per_axis")
        if residual and in_channels != out_channels:
            raise ValueError(f"{name}: residual needs out_channels={in_channels} as in_channels, got {out_channels}")
        self.in_channels, self.out_channels, self.num_heads, self.scale = in_channels, out_channels, num_heads, scale
        self.combine, self.order, self.merge, self.residual = combine, tuple(order), merge, residual

        def projection(width: int) -> nn.Module:
            conv = nn.Conv2d(in_channels, width, 1, bias=bias)
            layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
            if norm_layer is not None:
                norm = norm_layer(width)
                layers["gn" if isinstance(norm, nn.GroupNorm) else "bn"] = norm
            if act_layer is not None:
                layers["act"] = act_layer()
            return nn.Sequential(layers) if len(layers) > 1 else conv

        # One call of axial_attention for each entry: its axes, and the names of its query and key.
        calls = [((axis,), f"_{axis}") for axis in self.order] if qk_per_axis else [(self.order, "")]
        self._calls = [(axes, *((f"query_key{s}",) * 2 if tie_qk else (f"query{s}", f"key{s}"))) for axes, s in calls]
        for _, *names in self._calls:
            for child in dict.fromkeys(names):
                self.add_module(child, projection(qk_channels))
        self.value = projection(out_channels)
        init_glorot(self)
        for _, query, key in self._calls:
            self.get_submodule(key).load_state_dict(self.get_submodule(query).state_dict())

    @classmethod
    def caa(cls, channels: int, qk_channels: int = 64) -> AxialAttention2d:
        """CAA's, without its channel gates: for each axis one 1x1 convolution, BN, ReLU, whose result is query and key;
        value by another of ``channels``; one head, no scaling.
        """
        return cls(
            channels, qk_channels=qk_channels, num_heads=1, scale=1.0, tie_qk=True, qk_per_axis=True, bias=False,
            norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H, W]."""
        check_map(type(self).__name__, "x", x, self.in_channels)
        value = self.value(x)
        results: list[Tensor] = []
        for axes, *names in self._calls:
            projected = {child: getattr(self, child)(x) for child in dict.fromkeys(names)}
            q, k = (projected[child] for child in names)
            v = results.pop() if results and self.combine == "compose" else value
            results.append(
                axial_attention(q, k, v, num_heads=self.num_heads, scale=self.scale, combine=self.combine, order=axes)
            )
        y = reduce(torch.add, results)
        if self.merge == "interleaved":
            y = _interleave(y, self.num_heads)
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, scale={self.scale}, combine={self.combine!r}, order={self.order}, "
            f"merge={self.merge!r}, residual={self.residual}"
        )


def _interleave(y: Tensor, num_heads: int) -> Tensor:
    """Channel c of head h to c * num_heads + h."""
    if y.stride(1) == 1:  # moved where they lie, or channels_last would be lost
        return y.permute(0, 2, 3, 1).unflatten(3, (num_heads, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
    return y.unflatten(1, (num_heads, -1)).transpose(1, 2).flatten(1, 2)
