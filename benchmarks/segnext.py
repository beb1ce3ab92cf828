"""SegNeXt with segops' ops against the same model in eager PyTorch: time and peak memory.

python benchmarks/segnext.py                                        # T, 512x512: one image predicted, four in training
python benchmarks/segnext.py --variant b --machine xeon-2core       # and keep it in results/<machine>/segnext.json

Eager is the plain-PyTorch twin that the tests hold segops.nn.SegNeXt to: same weights, same bases. Prediction gives
labels of the image's size; training is a forward, the loss and its backward. How it is measured: see _sides.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _sides import FORMATS, ROOT, Call, measure, peak_of, table
from torch import Tensor, nn

import segops
from segops.nn import SegNeXt

sys.path.insert(0, str(ROOT))

from tests.nn.segnext_twin import TwinHam, TwinMSCAN

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


def call_of(variant: str, size: int, direction: str, side: str, layout: str) -> Call:
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


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        variant, size, *call = sys.argv[2:]
        print(peak_of(call_of(variant, 64, *call), call_of(variant, int(size), *call)))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", choices=("t", "s", "b", "l"), default="t")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--direction", choices=tuple(DIRECTIONS), action="append", help="default: both")
    parser.add_argument("--machine", help="keep the numbers in results/MACHINE/segnext.json")
    args = parser.parse_args()
    wanted = args.direction or list(DIRECTIONS)
    rows = []
    for direction in wanted:
        case = (args.variant, args.size, direction)
        row = measure(partial(call_of, *case), args.rounds, lambda side, layout, case=case: (*case, side, layout))
        rows.append({"direction": direction, "batch": DIRECTIONS[direction], **row})
    title = f"SegNeXt-{args.variant.upper()}, {args.size}x{args.size}"
    print(table(title, rows, lambda row: f"{row['direction']}, batch {row['batch']}"))
    if args.machine:
        out = ROOT / "benchmarks" / "results" / args.machine / "segnext.json"
        about = {"variant": args.variant, "size": args.size, "threads": torch.get_num_threads(), "rows": rows,
                 "versions": {"segops": segops.__version__, "torch": torch.__version__}}  # fmt: skip
        out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
