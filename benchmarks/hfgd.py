"""HFGD's head with its loss, on the maps that ResNet-50 makes of 513x513, against the same head in eager PyTorch.

python benchmarks/hfgd.py                                       # OS 4, 150 classes, two images
python benchmarks/hfgd.py --classes 59 --machine xeon-2core     # and keep it in results/<machine>/hfgd.json

Eager is the plain-PyTorch twin that the tests hold segops.nn.HFGDHead to: same weights, scaled_dot_product_attention,
full-size logits, CAR with one-hot matrix products. The loss is the fine and the coarse cross-entropy and CAR's three.
How it is measured: see _sides.py. The gate is 1.2 times, forward and in training, in both memory formats.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from _sides import FORMATS, ROOT, Call, measure, peak_of, table
from torch import Tensor

import segops
from segops.nn import CAR, HFGDHead

sys.path.insert(0, str(ROOT))

from tests.nn.hfgd_twin import TwinHFGD

WIDTHS, STRIDES = (256, 512, 1024, 2048), (4, 8, 16, 32)
DIRECTIONS = ("loss", "training", "prediction")
GATES = {"loss": 1.2, "training": 1.2}


def call_of(direction: str, side: str, layout: str, *, size: int, batch: int, classes: int, output_stride: int) -> Call:
    """The loss, the loss with gradients by name, or labels of the image's size."""
    torch.manual_seed(0)
    head: Any = HFGDHead(WIDTHS, classes, output_stride=output_stride)
    extra: dict[str, Any] = {"car": CAR(classes)}
    if side == "eager":
        twin = TwinHFGD(WIDTHS, classes, 256, 512, 64, 4, doublings=3 - output_stride.bit_length())
        twin.load_state_dict(head.state_dict())
        head, extra = twin, {}
    head = head.to(memory_format=FORMATS[layout]).train(direction != "prediction")
    generator = torch.Generator().manual_seed(1)
    features = [
        torch.randn(batch, width, *[-(-size // stride)] * 2, generator=generator).relu()
        for width, stride in zip(WIDTHS, STRIDES, strict=True)
    ]
    features = [x.to(memory_format=FORMATS[layout]) for x in features]
    target = torch.randint(classes, (batch, size, size), generator=generator)

    @torch.no_grad()
    def loss() -> dict[str, Tensor]:
        return {"loss": head.loss(features, target, **extra)}

    def training() -> dict[str, Tensor]:
        wanted = {**dict(head.named_parameters()), "features": features[-1].requires_grad_()}
        loss = head.loss(features, target, **extra)
        gradients = torch.autograd.grad(loss, list(wanted.values()))
        return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}

    @torch.no_grad()
    def prediction() -> dict[str, Tensor]:
        return {"labels": head.predict(features, (size, size))}

    return {"loss": loss, "training": training, "prediction": prediction}[direction]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=513)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--output-stride", type=int, default=4, choices=(4, 2))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--direction", choices=DIRECTIONS, action="append", help="default: all")
    parser.add_argument("--machine", help="keep the numbers in results/MACHINE/hfgd.json")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "FORMAT"), help="print the peak memory of one direction")
    args = parser.parse_args()
    case = {"size": args.size, "batch": args.batch, "classes": args.classes, "output_stride": args.output_stride}
    wanted = args.direction or DIRECTIONS
    if args.peak:
        small = call_of(wanted[0], *args.peak, **{**case, "size": 65})
        print(peak_of(small, call_of(wanted[0], *args.peak, **case)))
        return
    flags = [text for name, value in case.items() for text in (f"--{name.replace('_', '-')}", value)]
    rows = []
    for direction in wanted:

        def call(side: str, layout: str, direction: str = direction) -> Call:
            return call_of(direction, side, layout, **case)

        def peak(side: str, layout: str, direction: str = direction) -> list[str | int]:
            return [side, layout, "--direction", direction, *flags]

        rows.append({"direction": direction, **measure(call, args.rounds, peak)})
    title = f"HFGD's head, OS {args.output_stride}, {args.batch}x{args.size}x{args.size}, {args.classes} classes"
    print(table(title, rows, lambda row: row["direction"]))
    for row in rows:
        for layout, ratio in row["times_faster"].items():
            if ratio < GATES.get(row["direction"], 0.0):
                print(f"below the gate of {GATES[row['direction']]}: {row['direction']}, {layout}, {ratio:.2f}")
    if args.machine:
        out = ROOT / "benchmarks" / "results" / args.machine / "hfgd.json"
        about = {**case, "threads": torch.get_num_threads(), "rows": rows,
                 "versions": {"segops": segops.__version__, "torch": torch.__version__}}  # fmt: skip
        out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
