"""segops' model against its plain-PyTorch twin: checked, then timed side by side, and their peak memory.

A call belongs to a side and a memory format and returns tensors by name. Sides and formats are interleaved, minimum of
the rounds; eager counts in its best format. Memory is the high-water mark of a fresh process above its mark after a
small warm-up call. A side that computes something else fails before anything is timed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SIDES = ("segops", "eager")

Call = Callable[[], dict[str, Tensor]]


def check(calls: dict[tuple[str, str], Call]) -> None:
    """Both sides give the same, up to what float32 leaves of a deep network."""
    results = {side: calls[side, "nchw"]() for side in SIDES}
    # Of what is zero but for rounding, such as the gradient of a bias in front of a BatchNorm, there is no share.
    norms = [float(value.norm()) for name, value in results["eager"].items() if name != "labels"]
    least = 1e-6 * max(norms, default=1.0)
    for name, expected in results["eager"].items():
        value = results["segops"][name]
        if name == "labels":
            error = float((value != expected).double().mean())
        else:
            error = float((value - expected).norm() / expected.norm().clamp(min=least))
        if not error < 1e-2:
            sys.exit(f"{Path(sys.argv[0]).name}: {name} differs by {error:.2g}")


def measure(call_of: Callable[[str, str], Call], rounds: int, peak: Callable[[str, str], Sequence[str | int]]) -> dict:
    """Milliseconds, ratios and peaks of one case.

    Args:
        call_of: Side and format to the call.
        rounds: Timed ones, after one that is not timed.
        peak: Side and format to the arguments after ``--peak`` with which this script prints the peak.
    """
    calls = {(side, layout): call_of(side, layout) for side in SIDES for layout in FORMATS}
    check(calls)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(1e3 * (time.perf_counter() - start))
    best = {key: min(values[1:]) for key, values in times.items()}
    eager = min(best["eager", layout] for layout in FORMATS)
    return {
        "ms": {side: {layout: best[side, layout] for layout in FORMATS} for side in SIDES},
        "times_faster": {layout: eager / best["segops", layout] for layout in FORMATS},
        "peak_mib": {
            side: {layout: _peak_in_fresh_process(peak(side, layout)) for layout in FORMATS} for side in SIDES
        },
    }


def _peak_in_fresh_process(arguments: Sequence[str | int]) -> float:
    command = [sys.executable, sys.argv[0], "--peak", *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_of(warm_up: Call, call: Call) -> float:
    """MiB, in this process."""
    sys.path.insert(0, str(ROOT / "examples"))
    from memory import peak_mib

    warm_up()
    return peak_mib(call, "cpu")


def table(title: str, rows: list[dict], name_of: Callable[[dict], str]) -> str:
    lines = [f"{title}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    lines.append(f"{'':28}{'':16}{'segops':>10}{'eager':>10}{'ratio':>8}")
    for row in rows:
        eager = min(row["ms"]["eager"].values())
        least = min(row["peak_mib"]["eager"].values())
        for layout in FORMATS:
            name = name_of(row) if layout == "nchw" else ""
            lines.append(f"{name:28}{layout:16}{row['ms']['segops'][layout]:7.1f} ms{eager:7.1f} ms"
                         f"{row['times_faster'][layout]:7.2f}x")  # fmt: skip
        taken = min(row["peak_mib"]["segops"].values())
        lines.append(f"{'':28}{'peak memory':16}{taken:6.0f} MiB{least:6.0f} MiB{least / taken:7.2f}x")
    return "\n".join(lines)
