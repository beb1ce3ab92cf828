"""What full-size logits cost: a training step and a validation pass of a head, with them and without.

    python examples/logits_free.py                              # 150 classes, 8 images of 512x512
    python examples/logits_free.py --batch 2 --size 256

"stored" is what is usually written: convolution, PixelShuffle or bilinear interpolation, then cross-entropy, or argmax
and bincount. "fused" is segops: the same values, but the logits of the full size never exist. Prints a table; into
--out go logits_free.png and logits_free.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import segops
from memory import peak_mib
from segops.nn import DUpsampling

HEADS = {"dup": "DUpsampling of 64 channels at 1/16", "bilinear": "1x1 convolution of 64 channels at 1/4, bilinear x4"}
PASSES = {"train": "training step", "validate": "validation pass"}
SIDES = ("fused", "stored")
COLOURS = {"fused": "#2a6f97", "stored": "#c9c9c9"}


@dataclass(frozen=True)
class Case:
    """One number of the table: which head does what, and whether logits are stored."""

    head: str
    what: str
    side: str

    def step(self, classes: int, batch: int, size: int, device: str) -> Callable[[], Tensor]:
        """A call that returns the loss, or the confusion matrix."""
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(0, classes, (batch, size, size), generator=generator).to(device)
        stride = 16 if self.head == "dup" else 4
        side = -(-size // stride)
        x = torch.randn(batch, 64, side, side, generator=generator).to(device)
        torch.manual_seed(0)
        head = DUpsampling(64, classes, 16) if self.head == "dup" else nn.Conv2d(64, classes, 1)
        head.to(device)
        optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)

        def train() -> Tensor:
            optimizer.zero_grad()
            value = LOSSES[self.head, self.side](head, x.detach().requires_grad_(), target)
            value.backward()
            optimizer.step()
            return value.detach()

        @torch.no_grad()
        def validate() -> Tensor:
            prediction = LABELS[self.head, self.side](head, x, (size, size))
            if self.side == "fused":
                return segops.confusion_matrix(prediction, target, classes)
            return torch.bincount((target * classes + prediction).flatten(), minlength=classes**2).view(classes, -1)

        return train if self.what == "train" else validate


def dup_logits(head: DUpsampling, x: Tensor, size: tuple[int, int]) -> Tensor:
    r, k = head.scale_factor, head.num_classes
    weight = head.weight.view(r, r, k, -1).permute(2, 0, 1, 3).reshape(head.weight.shape)
    bias = head.bias.view(r, r, k).permute(2, 0, 1).flatten()
    return F.pixel_shuffle(F.conv2d(x, weight, bias), r)[:, :, : size[0], : size[1]] / head.temperature


def bilinear_logits(head: nn.Conv2d, x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(head(x), size, mode="bilinear")


LOSSES: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("dup", "fused"): lambda head, x, target: head.loss(x, target),
    ("dup", "stored"): lambda head, x, target: F.cross_entropy(dup_logits(head, x, target.shape[1:]), target),
    ("bilinear", "fused"): lambda head, x, target: segops.upsample_cross_entropy(head(x), target),
    ("bilinear", "stored"): lambda head, x, target: F.cross_entropy(bilinear_logits(head, x, target.shape[1:]), target),
}
LABELS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("dup", "fused"): lambda head, x, size: head.predict(x, size),
    ("dup", "stored"): lambda head, x, size: dup_logits(head, x, size).argmax(1),
    ("bilinear", "fused"): lambda head, x, size: segops.upsample_argmax(head(x), size),
    ("bilinear", "stored"): lambda head, x, size: bilinear_logits(head, x, size).argmax(1),
}


def main() -> None:
    summary, _, text = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=150, metavar="K", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="side of an image (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds, sides in turn (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/logits_free"), metavar="DIR", help="%(default)s")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.classes - 1, args.batch, args.size, args.rounds) < 1:
        parser.error("--classes must be at least 2, --batch, --size and --rounds at least 1")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    shape = args.classes, args.batch, args.size, args.device
    if args.peak_of:
        case = Case(*args.peak_of)
        case.step(args.classes, 1, 32, args.device)()
        print(peak_mib(case.step(*shape), args.device))
        return

    results = {
        "command": " ".join(["python", "examples/logits_free.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "versions": {"segops": segops.__version__, "torch": torch.__version__},
        "classes": args.classes,
        "batch": args.batch,
        "size": args.size,
        "cases": [measure(head, what, shape, args.rounds) for head in HEADS for what in PASSES],
    }
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "logits_free.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(args.out / "logits_free.png", results)
    print(f"\nwritten: {args.out / 'logits_free.png'}, {args.out / 'logits_free.json'}")


def measure(head: str, what: str, shape: tuple[int, int, int, str], rounds: int) -> dict:
    """Both sides of one head and pass: {"head", "pass", "backends", "ms", "peak_mib", "difference"}."""
    print(f"measuring: {HEADS[head]}, {PASSES[what]}", file=sys.stderr)
    cases = {side: Case(head, what, side) for side in SIDES}
    peaks = {side: _peak_in_fresh_process(case, shape) for side, case in cases.items()}
    steps = {side: case.step(*shape) for side, case in cases.items()}
    with segops.record() as log:
        first = {side: step().double() for side, step in steps.items()}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, step in steps.items():
            times[side].append(_seconds(step, shape[-1]))
    return {
        "head": head,
        "pass": what,
        "backends": sorted({f"{call.op} ({call.backend})" for call in log}),
        "ms": {side: round(1e3 * min(seconds), 2) for side, seconds in times.items()},
        "peak_mib": {side: round(peak, 2) for side, peak in peaks.items()},
        "difference": float((first["fused"] - first["stored"]).abs().sum() / first["stored"].abs().sum()),
    }


def table(results: dict) -> str:
    head = "{classes} classes, {batch} images of {size}x{size}; {device}, {threads} threads, torch {0}"
    lines = [head.format(results["versions"]["torch"], **results)]
    for case in results["cases"]:
        lines.append(f"\n{HEADS[case['head']]}: {PASSES[case['pass']]}; {', '.join(case['backends'])}")
        lines.append(f"  {'':18}{'stored':>12}{'fused':>12}{'ratio':>9}")
        for name, key in (("time, ms", "ms"), ("peak memory, MiB", "peak_mib")):
            fused, stored = case[key]["fused"], case[key]["stored"]
            lines.append(f"  {name:18}{stored:12.1f}{fused:12.1f}{stored / max(fused, 1e-9):8.1f}x")
        what = "loss" if case["pass"] == "train" else "confusion matrix"
        lines.append(f"  relative difference of the {what}: {case['difference']:.1e}")
    lines.append(
        "\ntime: sides in turn, minimum of the rounds; memory: high-water mark of a fresh process above its inputs"
    )
    return "\n".join(lines)


def plot(path: Path, results: dict) -> None:
    figure = Figure(figsize=(8.6, 3.1), dpi=100, layout="constrained")
    names = [f"{'DUpsampling' if c['head'] == 'dup' else 'bilinear'}\n{PASSES[c['pass']]}" for c in results["cases"]]
    for axis, key, title in zip(figure.subplots(1, 2, sharey=True), ("peak_mib", "ms"),
                                ("peak memory, MiB", "time, ms"), strict=True):  # fmt: skip
        for offset, side in ((0.2, "fused"), (-0.2, "stored")):
            values = [max(case[key][side], 0.1) for case in results["cases"]]
            places = [i + offset for i in range(len(names))]
            bars = axis.barh(places, values, 0.38, color=COLOURS[side], label=f"{side} logits"
                             if side == "stored" else "segops: no logits")  # fmt: skip
            axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(right=axis.get_xlim()[1] * 3)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("{classes} classes, {batch} images of {size}x{size}, {0}".format(
        f"{results['threads']} CPU threads" if "CPU" in results["device"] else results["device"], **results
    ), fontsize=11)  # fmt: skip
    figure.savefig(path, format="png")


def _peak_in_fresh_process(case: Case, shape: tuple[int, int, int, str]) -> float:
    options = [f"--{name}={value}" for name, value in zip(("classes", "batch", "size", "device"), shape, strict=True)]
    command = [sys.executable, __file__, *options, f"--threads={torch.get_num_threads()}"]
    command += ["--peak-of", case.head, case.what, case.side]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout.split()[-1])


def _seconds(step: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else f"{platform.machine()} CPU"


if __name__ == "__main__":
    main()
