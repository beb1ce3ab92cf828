"""NATTEN's layout and rule, against an independent loop over its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

import segops


def neighbourhood(i, length, kernel, dilation):
    """NATTEN's window of position i: the nearest `kernel` positions of its dilation phase, all inside the map."""
    phase = list(range(i % dilation, length, dilation))
    at = phase.index(i)
    start = min(max(at - kernel // 2, 0), len(phase) - kernel)
    return phase[start : start + kernel]


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 5), (2, 1)), ((3, 3), (1, 2)), ((5, 3), (1, 1))])
def test_na2d_is_nattens(kernel, dilation):
    query, key = torch.randn(2, 1, 7, 8, 2, 3, dtype=torch.float64).unbind()
    value = torch.randn(1, 7, 8, 2, 4, dtype=torch.float64)
    out = segops.compat.na2d(query, key, value, kernel, 1, dilation, scale=0.8)
    assert out.shape == value.shape
    for y, x, head in itertools.product(range(7), range(8), range(2)):
        rows, columns = neighbourhood(y, 7, kernel[0], dilation[0]), neighbourhood(x, 8, kernel[1], dilation[1])
        keys = torch.stack([key[0, r, c, head] for r in rows for c in columns])
        values = torch.stack([value[0, r, c, head] for r in rows for c in columns])
        expected = torch.softmax(0.8 * keys @ query[0, y, x, head], 0) @ values
        torch.testing.assert_close(out[0, y, x, head], expected, rtol=1e-12, atol=1e-12)


def test_na2d_copies_nothing_on_the_way_in():
    query = torch.randn(1, 6, 7, 2, 4)
    assert query.flatten(3).data_ptr() == query.data_ptr()
    assert segops.compat.na2d(query, query, query, 3).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 2}, "stride must be 1, got 2"),
        ({"is_causal": True}, "is_causal must be False, got True"),
        ({"query": torch.zeros(1, 4, 5, 6)}, r"query must be \[N, H, W, heads, d\]"),
        ({"dilation": 9}, "border='shift' needs"),
    ],
)
def test_na2d_refuses_with_a_reason(change, message):
    good = {name: torch.zeros(1, 6, 7, 2, 4) for name in ("query", "key", "value")} | {"kernel_size": 3}
    with pytest.raises(ValueError, match=message):
        segops.compat.na2d(**{**good, **change})
