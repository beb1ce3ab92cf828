"""SegNeXt with segops' ops against the same model in eager PyTorch: time and peak memory.

python benchmarks/segnext.py                                        # T, 512x512: one image predicted, four in training
python benchmarks/segnext.py --variant b --machine xeon-2core       # and keep it in results/<machine>/segnext.json

Eager is the plain-PyTorch twin that the tests hold segops.nn.SegNeXt to: same weights, same bases. Sides and memory
formats are interleaved, minimum of the rounds; eager in its best format. Prediction gives labels of the image's size;
training is a forward, the loss and its backward. Memory is the high-water mark of a fresh process above its mark after
a small warm-up step. A side that computes something else fails before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segops
from segops.nn import SegNeXt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.nn.segnext_twin import TwinHam, TwinMSCAN  # noqa: E402

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SIDES = ("segops", "eager")
DIRECTIONS = {"prediction": 1, "training": 4}  # and the batch
CLASSES = 150


class Twin(nn.Module):
    """SegNeXt as its authors write it."""

    def __init__(self, model: SegNeXt) -> None:
        super().__init__()
        widths = [about["num_chs"] for about in model.backbone.feature_info]
        depths = [len(getattr(model.backbone, f"block{i}")) for i in range(1, 5)]
        channels = model.decode_head.squeeze.conv.out_channels
        self.bases = model.decode_head.hamburger.bases
        self.backbone = TwinMSCAN(widths, depths, (8, 8, 4, 4), (7, 11, 21))
        self.decode_head = TwinHam(widths[1:], CLASSES, channels, 32)
        self.load_state_dict(model.state_dict())

    def logits(self, image: Tensor) -> Tensor:
        logits = self.decode_head(self.backbone(image)[1:], self.bases)
        return F.interpolate(logits, image.shape[2:], mode="bilinear")

    def forward(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.logits(image), target)}

    def predict(self, image: Tensor) -> Tensor:
        return self.logits(image).argmax(1)


def call_of(variant: str, size: int, direction: str, side: str, layout: str) -> Callable[[], dict[str, Tensor]]:
    """Labels, or loss and gradients by name."""
    torch.manual_seed(0)
    model: Any = SegNeXt(variant, CLASSES, bases="fixed", drop_path_rate=0.0)
    model.decode_head.dropout.p = 0.0
    model = (model if side == "segops" else Twin(model)).to(memory_format=FORMATS[layout])
    batch = DIRECTIONS[direction]
    torch.manual_seed(1)  # the twin has drawn weights of its own
    image = torch.randn(batch, 3, size, size).to(memory_format=FORMATS[layout])
    target = torch.randint(CLASSES, (batch, size, size))
    parameters = dict(model.named_parameters())

    def prediction() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"labels": model.predict(image)}

    def training() -> dict[str, Tensor]:
        loss = model(image, target)["loss"]
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return {"loss": loss.detach(), **dict(zip(parameters, gradients, strict=True))}

    model.train(direction == "training")
    return prediction if direction == "prediction" else training


def check(calls: dict[tuple[str, str], Callable[[], dict[str, Tensor]]]) -> None:
    """Both sides give the same, up to what float32 leaves of a deep network."""
    results = {side: calls[side, "nchw"]() for side in SIDES}
    for name, expected in results["eager"].items():
        value = results["segops"][name]
        if name == "labels":
            error = float((value != expected).double().mean())
        else:
            error = float((value - expected).norm() / expected.norm().clamp(min=1e-6))
        if not error < 1e-2:
            sys.exit(f"segnext.py: {name} differs by {error:.2g}")


def measure(variant: str, size: int, direction: str, rounds: int) -> dict:
    calls = {(side, layout): call_of(variant, size, direction, side, layout) for side in SIDES for layout in FORMATS}
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
        "direction": direction,
        "batch": DIRECTIONS[direction],
        "ms": {side: {layout: best[side, layout] for layout in FORMATS} for side in SIDES},
        "times_faster": {layout: eager / best["segops", layout] for layout in FORMATS},
        "peak_mib": {
            side: {layout: peak_in_fresh_process(variant, size, direction, side, layout) for layout in FORMATS}
            for side in SIDES
        },
    }


def peak_in_fresh_process(*arguments: str | int) -> float:
    command = [sys.executable, __file__, "--peak", *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak(variant: str, size: str, direction: str, side: str, layout: str) -> float:
    sys.path.insert(0, str(ROOT / "examples"))
    from memory import peak_mib

    call_of(variant, 64, direction, side, layout)()
    return peak_mib(call_of(variant, int(size), direction, side, layout), "cpu")


def table(variant: str, size: int, rows: list[dict]) -> str:
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [f"SegNeXt-{variant.upper()}, {size}x{size}, float32, {machine}"]
    lines.append(f"{'':22}{'':16}{'segops':>10}{'eager':>10}{'ratio':>8}")
    for row in rows:
        eager = min(row["ms"]["eager"].values())
        least = min(row["peak_mib"]["eager"].values())
        for layout in FORMATS:
            name = f"{row['direction']}, batch {row['batch']}" if layout == "nchw" else ""
            lines.append(f"{name:22}{layout:16}{row['ms']['segops'][layout]:7.1f} ms{eager:7.1f} ms"
                         f"{row['times_faster'][layout]:7.2f}x")  # fmt: skip
        taken = min(row["peak_mib"]["segops"].values())
        lines.append(f"{'':22}{'peak memory':16}{taken:6.0f} MiB{least:6.0f} MiB{least / taken:7.2f}x")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        print(peak(*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", choices=("t", "s", "b", "l"), default="t")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--direction", choices=tuple(DIRECTIONS), action="append", help="default: both")
    parser.add_argument("--machine", help="keep the numbers in results/MACHINE/segnext.json")
    args = parser.parse_args()
    wanted = args.direction or list(DIRECTIONS)
    rows = [measure(args.variant, args.size, direction, args.rounds) for direction in wanted]
    print(table(args.variant, args.size, rows))
    if args.machine:
        out = ROOT / "benchmarks" / "results" / args.machine / "segnext.json"
        about = {"variant": args.variant, "size": args.size, "threads": torch.get_num_threads(), "rows": rows,
                 "versions": {"segops": segops.__version__, "torch": torch.__version__}}  # fmt: skip
        out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
