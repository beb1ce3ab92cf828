"""The committed static audit holds what is promised of the shipped kernels, and is not stale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
AUDIT = ROOT / "benchmarks" / "audit.py"
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "audit.json").read_text())

# One kernel of each kind, compiled again here, so that the numbers below cannot outlive the code.
LIVE = [
    "local_attention/forward/bf16/channels_last/d32/k5/zero",
    "local_attention/backward_key_value/fp32/nchw/d32/k5/zero",
    "dupsample_cross_entropy/backward_weight/bf16/channels_last/c64/k21",
    "upsample_cross_entropy/backward/bf16/nchw/x4/half_pixel",
]


def _python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def live():
    """The rows of LIVE, computed now."""
    return json.loads(_python(AUDIT, *(part for name in LIVE for part in ("--only", name)), "--output", "-"))


def _shipped(rows):
    return [row for row in rows if "/fp64/" not in row["kernel"]]


def _spilling(rows):
    return [(row["kernel"], row["arch"], row["spill_bytes"]) for row in _shipped(rows) if row["spill_bytes"]]


def _without_tensor_cores(rows):
    half = [row for row in rows if row["dot"] and ("/fp16/" in row["kernel"] or "/bf16/" in row["kernel"])]
    return [(row["kernel"], row["arch"]) for row in half if not row["tensor_core"]]


def _narrow(rows):
    """Channels-last kernels whose rows of channels are not read 16 bytes at a time. Rows of 19 or 150 logits cannot."""
    wide = [row for row in rows if "/channels_last/" in row["kernel"] and row["arch"].startswith("sm_")]
    wide = [row for row in wide if not row["kernel"].startswith("upsample_")]
    return [(row["kernel"], row["arch"], row["load_widths"]) for row in wide if "128" not in row["load_widths"]]


def _triton(rows):
    return [row for row in rows if "/cuda/" not in row["kernel"]]


def _cuda(rows):
    return [row for row in rows if "/cuda/" in row["kernel"]]


@pytest.mark.parametrize("choose", [_triton, _cuda])
def test_no_shipped_kernel_spills(choose, live):
    assert not _spilling(choose(COMMITTED["rows"] + live["rows"]))


def test_half_precision_dots_are_tensor_core_instructions(live):
    assert not _without_tensor_cores(_triton(COMMITTED["rows"] + live["rows"]))


def test_channels_last_loads_are_16_bytes_wide(live):
    assert not _narrow(_triton(COMMITTED["rows"] + live["rows"]))


def test_the_committed_audit_names_every_kernel():
    names = _python("-c", "from segops.kernels._launch import aot_cases; print(*dict(aot_cases()))").split()
    assert {row["kernel"] for row in _triton(COMMITTED["rows"])} == set(names), "run python benchmarks/audit.py"


def test_the_committed_audit_is_of_this_code(live):
    if not live["versions"].items() <= COMMITTED["versions"].items():
        pytest.skip(f"the committed audit is by {COMMITTED['versions']}, here is {live['versions']}")
    committed = {(row["kernel"], row["arch"]): row for row in COMMITTED["rows"]}
    for row in live["rows"]:
        assert row == committed[row["kernel"], row["arch"]], "run python benchmarks/audit.py"


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (_spilling, {"spill_bytes": 8}),
        (_without_tensor_cores, {"dot": True, "tensor_core": False}),
        (_narrow, {"load_widths": {"16": 4}}),
    ],
)
def test_each_check_can_fail(check, change):
    row = {
        "kernel": LIVE[0],
        "arch": "sm_90",
        "spill_bytes": 0,
        "dot": False,
        "tensor_core": False,
        "load_widths": {"128": 1},
    }
    assert not check([row])
    assert check([row | change])
