"""Other libraries' layouts and argument orders on segops' operators."""

from __future__ import annotations

from torch import Tensor

from . import _checks
from .ops.local_attention import local_attention

__all__ = ["na2d"]


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | None = None,
) -> Tensor:
    """NATTEN's ``na2d``: neighbourhood attention with windows pushed back inside the map, heads last.

    Args:
        query: [N, H, W, num_heads, d].
        key: [N, H, W, num_heads, d].
        value: [N, H, W, num_heads, d_v].
        kernel_size: Taps per axis, (height, width) or one int; odd, and kernel_size * dilation at most the map.
        stride: Only 1.
        dilation: Distance between taps, (height, width) or one int.
        is_causal: Only False.
        scale: Factor on the logits; None means 1 / sqrt(d).

    Returns:
        [N, H, W, num_heads, d_v].

    Raises:
        ValueError: a stride, a causal mask, an even kernel_size, or a window larger than the map.

    The tensors are viewed, not copied, as channels_last maps of :func:`segops.local_attention` with ``border="shift"``;
    its gradients, dtypes and backends are this function's.

    Example:
        >>> q, k, v = torch.randn(3, 1, 14, 15, 4, 8).unbind()
        >>> segops.compat.na2d(q, k, v, kernel_size=7, dilation=2).shape
        torch.Size([1, 14, 15, 4, 8])
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.tensor("na2d", name, tensor, "[N, H, W, heads, d]")
    if _checks.pair("na2d", "stride", stride) != (1, 1):
        raise ValueError(f"na2d: stride must be 1, got {stride!r}")
    if is_causal not in (False, (False, False)):
        raise ValueError(f"na2d: is_causal must be False, got {is_causal!r}")
    heads = query.shape[3]
    q, k, v = (x.flatten(3).permute(0, 3, 1, 2) for x in (query, key, value))
    out = local_attention(q, k, v, kernel_size, dilation, num_heads=heads, scale=scale, border="shift")
    return out.permute(0, 2, 3, 1).unflatten(3, (heads, -1))
