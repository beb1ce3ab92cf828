"""The oracle comparison and its tolerances, shared by the tests and the benchmarks.

The oracle is the reference in float64 on inputs rounded to the tested dtype. The table bounds exact operators; for a
value that is a long sum, a softmax or recomputed, the bound is the larger of the table and twice the error that eager
PyTorch makes in the same dtype, which callers pass as ``eager``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Comparison", "Tolerance", "assert_close", "compare"]


class Tolerance(NamedTuple):
    """Elementwise ``atol + rtol * |oracle|``, and the bound on RMS error over RMS oracle."""

    rtol: float
    atol: float
    rms: float


TOLERANCES = {
    torch.float64: Tolerance(1e-7, 1e-7, 1e-12),
    torch.float32: Tolerance(1.3e-6, 1e-5, 1e-6),
    torch.float16: Tolerance(1e-3, 1e-5, 1e-3),
    torch.bfloat16: Tolerance(1.6e-2, 1e-5, 8e-3),
}


@dataclass(frozen=True)
class Comparison:
    """What came of one comparison. ``failure`` is None or a sentence; errors are against the oracle."""

    failure: str | None
    max_error: float
    rms_ratio: float


def compare(
    name: str, actual: Tensor, oracle: Tensor, eager: Tensor | None = None, dtype: torch.dtype | None = None
) -> Comparison:
    """Three checks: the same non-finite positions, every element, and the RMS ratio (of one element there is none).

    Args:
        name: What the failure sentence calls the value.
        actual: The value under test, any shape.
        oracle: The same shape, float64.
        eager: The same value from eager PyTorch in the tested dtype, where twice its error may excuse more than the
            table.
        dtype: The dtype whose tolerances hold; ``actual.dtype`` if None. For a float32 statistic of bfloat16 inputs,
            such as a log-sum-exp, it is still float32.
    """
    if actual.shape != oracle.shape:
        return Comparison(f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}", torch.inf, torch.inf)
    tolerance = TOLERANCES[dtype or actual.dtype]
    value, expected = actual.detach().double().cpu(), oracle.detach().double().cpu()
    if value.numel() == 0:
        return Comparison(None, 0.0, 0.0)
    finite = expected.isfinite()
    if not torch.equal(torch.where(finite, 0.0, expected), torch.where(value.isfinite(), 0.0, value)):
        wrong = (value.isfinite() != finite).sum().item()
        same = torch.equal(value.isnan(), expected.isnan()) and torch.equal(value.isinf(), expected.isinf())
        if not same:
            return Comparison(f"{name}: {wrong} of {value.numel()} elements (non-)finite elsewhere than in the oracle",
                              torch.inf, torch.inf)  # fmt: skip
    error, size = _error(value, expected, finite)
    bound = tolerance.atol + tolerance.rtol * expected.abs()
    rms_bound = tolerance.rms
    if eager is not None:
        eager_error, _ = _error(eager.detach().double().cpu(), expected, finite)
        bound = bound.clamp_min(2 * eager_error.max())
        rms_bound = max(rms_bound, 2 * _ratio(eager_error, size))
    rms_ratio = _ratio(error, size)
    over = (error > bound) & finite
    failure = None
    if over.any():
        at = int((error / bound).where(finite, 0.0).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), value.shape))
        failure = (
            f"{name}: {int(over.sum())} of {value.numel()} elements off, worst at {index}: {value[index]:.9g}, "
            f"expected {expected[index]:.9g} +- {bound[index]:.2g}"
        )
    elif value.numel() > 1 and rms_ratio > rms_bound and float(error.max()) > 0:
        failure = f"{name}: RMS error {rms_ratio:.2g} of the oracle's RMS, allowed {rms_bound:.2g}"
    return Comparison(failure, float(error.max()), rms_ratio)


def assert_close(
    name: str, actual: Tensor, oracle: Tensor, eager: Tensor | None = None, dtype: torch.dtype | None = None
) -> None:
    """Raises AssertionError with the sentence of :func:`compare`."""
    failure = compare(name, actual, oracle, eager, dtype).failure
    if failure is not None:
        raise AssertionError(failure)


def _error(value: Tensor, expected: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    return (value - expected).abs().where(finite, 0.0), expected.where(finite, 0.0)


def _ratio(error: Tensor, size: Tensor) -> float:
    scale = float(size.square().mean().sqrt())
    return float(error.square().mean().sqrt()) / scale if scale > 0 else 0.0
