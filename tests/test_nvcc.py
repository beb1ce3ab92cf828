"""Every CUDA file compiles for every architecture, on a machine without a GPU and with a torch without CUDA."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import _audit_cuda  # the audit reads the same objects


@pytest.mark.parametrize("arch", _audit_cuda.ARCHS)
@pytest.mark.parametrize("source", _audit_cuda.SOURCES, ids=lambda path: path.stem)
def test_compiles(source, arch):
    reason = _audit_cuda.nvcc_missing()
    if reason is not None:
        if "nvcc" in os.environ.get("SEGOPS_REQUIRE", "").split(","):
            pytest.fail(f"nvcc is required (SEGOPS_REQUIRE): {reason}")
        pytest.skip(reason)
    assert _audit_cuda.nvcc_object(source, arch).stat().st_size > 0


def test_there_is_something_to_compile():
    assert _audit_cuda.SOURCES
