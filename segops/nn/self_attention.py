"""Self-attention with narrow queries and keys and wide values (iSeg's, in the encoder of HFGD, 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..ops.axial_attention import axial_attention
from ._layers import check_map, init_glorot

__all__ = ["SelfAttention2d"]

# Pixels up to which scaled_dot_product_attention may hold their map (16 MB for an image): on a CPU it trains up to a
# third faster there, and is as fast forward.
STORED = 2048


class SelfAttention2d(nn.Module):
    """Every pixel attends to every pixel: ``softmax(scale * q k^T) v``, q, k and v by 1x1 convolutions of x.

    One head, no normalisation, no projection of the result; a residual is the caller's. Beyond 2048 pixels the map of
    all pairs is never in memory.

    Args:
        in_channels: Width of x.
        out_channels: Width of value and of the result; None means ``in_channels``.
        qk_channels: Width of query and key.
        scale: Factor on the logits, 1.0 in iSeg; None means 1 / sqrt(qk_channels).
        bias: Biases in the three convolutions.
        shared_querykey_weights: Query and key start from the same values. They are trained separately.

    Raises:
        ValueError: a width that is not positive, a scale that is not finite; in forward, a map of another width.

    Parameters: ``query``, ``key``, ``value``, each with ``.weight`` and ``.bias``, drawn from Glorot's uniform
    distribution. Runs in ``scaled_dot_product_attention`` where that stores no map, or one of up to 2048 pixels; else
    in :func:`segops.axial_attention` over the map as one row.

    Example:
        >>> from segops.nn import SelfAttention2d
        >>> SelfAttention2d(96, qk_channels=16)(torch.randn(2, 96, 17, 23)).shape
        torch.Size([2, 96, 17, 23])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        qk_channels: int = 64,
        scale: float | None = 1.0,
        bias: bool = True,
        shared_querykey_weights: bool = True,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        for argument, width in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("qk_channels", qk_channels),
        ):
            _checks.positive(type(self).__name__, argument, width)
        if scale is not None:
            _checks.finite(type(self).__name__, "scale", scale)
        self.in_channels, self.out_channels, self.scale = in_channels, out_channels, scale
        self.query = nn.Conv2d(in_channels, qk_channels, 1, bias=bias)
        self.key = nn.Conv2d(in_channels, qk_channels, 1, bias=bias)
        self.value = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        init_glorot(self)
        if shared_querykey_weights:
            with torch.no_grad():
                self.key.weight.copy_(self.query.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H, W]."""
        check_map(type(self).__name__, "x", x, self.in_channels)
        row = [conv(x).flatten(2).unsqueeze(2) for conv in (self.query, self.key, self.value)]  # [N, C, 1, H * W]
        # A graph that is exported is for any size.
        stored = not torch.compiler.is_exporting() and x.shape[2] * x.shape[3] <= STORED
        if not stored and not _stores_no_map(row):
            y = axial_attention(row[0], row[1], row[2], scale=self.scale, order=("width",))
        else:
            # What stores no map wants the channels innermost.
            q, k, v = (t.movedim(1, 3).contiguous() for t in row)
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale).movedim(3, 1)
        return y.squeeze(2).unflatten(2, x.shape[2:])

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def _stores_no_map(tensors: Sequence[Tensor]) -> bool:
    """scaled_dot_product_attention's kernel for widths that differ: CUDA's, of aligned rows, not in float64."""
    dtype = tensors[0].dtype
    aligned = all(x.shape[1] * x.element_size() % 16 == 0 for x in tensors)
    return (
        tensors[0].device.type == "cuda"
        and torch.backends.cuda.mem_efficient_sdp_enabled()
        and dtype != torch.float64
        and aligned
    )
