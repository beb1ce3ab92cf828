"""Every Triton kernel at its shipped configurations compiles for every architecture, on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
COMPILE_ALL = """
import sys
from segops.kernels._launch import aot_cases
for name, launch in aot_cases():
    try:
        launch.compile(sys.argv[1])
    except Exception as error:
        print(name, type(error).__name__, error)
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_shipped_configuration_compiles(arch):
    # A process of its own: this one may have imported triton with its interpreter on. The audit shares the cache.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-aot"))
    command = [sys.executable, "-c", COMPILE_ALL, arch]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
