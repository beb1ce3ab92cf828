"""A whole model with segops' ops against its plain-PyTorch twin: time, and peak memory of a fresh process.

Sides and memory formats are interleaved, minimum of the rounds; eager counts in its best format. Memory is the high
water mark of a fresh process above its mark after a small call. A side that computes something else fails before anything
is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from report import model_table
from torch import Tensor

import segops

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # the twins of the tests, and memory.py

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SIDES = ("segops", "eager")
WRONG = 1e-2  # what float32 leaves of a deep network

Call = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Direction:
    """What one row of the table measures; ``gate`` is how many times faster it has to be."""

    batch: int
    gate: float | None = None


def run(
    parser: argparse.ArgumentParser,
    script: str,
    directions: Mapping[str, Direction],
    title: Callable[[argparse.Namespace], str],
    call_of: Callable[[argparse.Namespace, str, str, str], Call],
    small: int,
) -> None:
    """The command line of a script.

    Args:
        parser: Has the model's own options, ``--size`` among them.
        script: Its file.
        directions: By name.
        title: Names the model in tables.
        call_of: Options, direction, side and format to a call that gives labels or numbers by name.
        small: ``--size`` of the warm-up call.
    """
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--direction", choices=tuple(directions), action="append", help="default: all")
    parser.add_argument("--machine", help="keep the numbers in results/MACHINE, which report.py reads")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(_peak(args, call_of, small))
        return
    rows = []
    for name in args.direction or directions:
        calls = {(side, layout): call_of(args, name, side, layout) for side in SIDES for layout in FORMATS}
        _check(script, {side: calls[side, "nchw"]() for side in SIDES})
        rows.append({"direction": name, "batch": directions[name].batch, "gate": directions[name].gate,
                     **_times(calls, args.rounds), "peak_mib": _peaks(script, name)})  # fmt: skip
    results = {
        "model": title(args),
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "threads": torch.get_num_threads(),
        "versions": {"segops": segops.__version__, "torch": torch.__version__},
        "directions": rows,
    }
    print(model_table(results))
    if args.machine:
        out = ROOT / "benchmarks" / "results" / args.machine / f"{Path(script).stem}.json"
        out.write_text(json.dumps(results, indent=1) + "\n")


def _check(script: str, results: dict[str, Mapping[str, Tensor]]) -> None:
    # Of what is zero but for rounding, such as the gradient of a bias in front of a BatchNorm, there is no share.
    norms = [float(value.norm()) for value in results["eager"].values() if value.is_floating_point()]
    least = 1e-6 * max(norms, default=1.0)
    for name, expected in results["eager"].items():
        value = results["segops"][name]
        if expected.is_floating_point():
            error = float((value - expected).norm() / expected.norm().clamp(min=least))
        else:
            error = float((value != expected).double().mean())
        if not error < WRONG:
            sys.exit(f"{Path(script).name}: {name} differs by {error:.2g}")


def _times(calls: dict[tuple[str, str], Call], rounds: int) -> dict:
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
    }


def _peaks(script: str, direction: str) -> dict[str, dict[str, float]]:
    def fresh(side: str, layout: str) -> float:
        command = [sys.executable, script, *sys.argv[1:], "--peak", direction, side, layout]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    return {side: {layout: fresh(side, layout) for layout in FORMATS} for side in SIDES}


def _peak(args: argparse.Namespace, call_of: Callable[..., Call], small: int) -> float:
    from memory import peak_mib

    call_of(argparse.Namespace(**{**vars(args), "size": small}), *args.peak)()
    return peak_mib(call_of(args, *args.peak), "cpu")
