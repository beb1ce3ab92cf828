"""No full-resolution logits, one-hot maps or maps of attention are in memory: peak of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import memory
from .lanes import Lane

ROOT = Path(__file__).parents[2]
THREADS = 2


def memory_of(name):
    Lane("cpu", "cpu").skip_if_missing(name.removesuffix("_forward"))
    if not memory.CLEAR.exists():
        pytest.skip(f"{memory.CLEAR} is missing: the high-water mark cannot be reset")
    command = [sys.executable, "-m", "tests.ops.memory", name, str(THREADS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name", ["dupsample_cross_entropy", "dupsample_argmax", "upsample_cross_entropy", "upsample_argmax"]
)
def test_peak_memory(name):
    """Forward and backward: outputs, 16 MiB and one weight gradient per thread. The logits would be 1.2 GB."""
    seen = memory_of(name)
    allowed = seen["outputs"] + (16 << 20) + THREADS * seen["weight"]
    assert seen["taken"] <= allowed, f"{seen['taken'] >> 20} MiB, allowed {allowed >> 20} MiB"


def test_peak_memory_of_car_losses():
    """Forward and backward: 1.1 times the features, and K x C. Every pixel's centre would be the features again."""
    features, centers = 8 * 512 * 64 * 64 * 4, 150 * 512 * 4
    seen = memory_of("car_losses")
    assert seen["taken"] <= 1.1 * features + centers, f"{seen['taken'] >> 20} MiB"


def test_peak_memory_of_axial_attention_forward():
    """What it takes beyond its output is a tenth of inputs and output. Permuted copies would be three outputs."""
    seen = memory_of("axial_attention_forward")
    assert seen["taken"] <= seen["outputs"] + 0.1 * 4 * seen["outputs"], f"{seen['taken'] >> 20} MiB"


def test_peak_memory_of_axial_attention():
    """16384 pixels in a row, forward and backward: linear. The map of all pairs would be 1 GB."""
    seen = memory_of("axial_attention")
    assert seen["taken"] <= 4 * seen["outputs"], f"{seen['taken'] >> 20} MiB"
