"""The lanes that the battery runs every op on: a backend, its device, and what sets it up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

import segops
from segops import _dispatch, _native
from tests.emulation import backend as emulation

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Lane:
    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None
    slow: bool = False  # interpreted or emulated
    largest: int = 1 << 62  # elements of a sample's inputs, at most

    def missing(self, op: str) -> tuple[str | None, bool]:
        """Why the lane cannot run the op here, and whether the op does without it by design."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no GPU", False
        if self.backend == "reference":
            return None, False
        if self.backend == emulation.NAME and emulation.missing() is not None:
            return emulation.missing(), False
        for name in (op, f"{op}_backward"):
            for row in _dispatch.OPS[name].backends[self.device] if name in _dispatch.OPS else ():
                if row.name == self.backend and row.available() is not None:
                    return row.available(), row.run is None
        if self.isa is not None and _best_isa() < _native.CPU_ISAS.index(self.isa):
            return f"this machine has no {self.isa}", False
        return None, False

    def skip_if_missing(self, op: str) -> None:
        """A skip with its reason, or a failure where SEGOPS_REQUIRE names the lane."""
        reason, by_design = self.missing(op)
        if reason is not None:
            required = os.environ.get("SEGOPS_REQUIRE", "").split(",")
            if {self.name, self.backend} & set(required) and not by_design:
                pytest.fail(f"{self.name} is required (SEGOPS_REQUIRE) and cannot run: {reason}")
            pytest.skip(reason)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.isa is not None:
            _native.cpu_isa(self.isa)
        try:
            with segops.use_backend(self.backend):
                yield
        finally:
            if self.isa is not None:
                _native.cpu_isa(_native.CPU_ISAS[-1])


def _best_isa() -> int:
    now = _native.cpu_isa()
    best = _native.cpu_isa(_native.CPU_ISAS[-1])
    _native.cpu_isa(now)
    return _native.CPU_ISAS.index(best)


LANES = [
    Lane("reference", "reference"),
    Lane("cpu-base", "cpu", isa="base"),
    Lane("cpu-avx2", "cpu", isa="avx2"),
    Lane("cpu-avx512", "cpu", isa="avx512"),
    Lane("triton-interpret", "triton-interpret", slow=True, largest=40_000),
    Lane("cuda-emulated", "cuda-emulated", slow=True),
    Lane("triton", "triton", device="cuda"),
    Lane("cuda", "cuda", device="cuda"),
]

every_lane = pytest.mark.parametrize("lane", LANES, ids=lambda lane: lane.name, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def outputs_of(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)
