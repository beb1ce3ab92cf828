"""HFGD's head on the maps that ResNet-50 makes of an image, against its plain-PyTorch twin: time and peak memory.

python benchmarks/hfgd.py                                       # OS 4, 150 classes, two images of 513x513
python benchmarks/hfgd.py --classes 59 --machine xeon-2core     # and keep it in results/<machine>/hfgd.json

Eager is the plain-PyTorch twin that the tests hold segops.nn.HFGDHead to: same weights, scaled_dot_product_attention,
full-size logits, CAR with one-hot matrix products. The loss is the fine and the coarse cross-entropy and CAR's three;
training is that with every gradient; prediction gives labels of the image's size.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _models import FORMATS, Call, Direction, run
from torch import Tensor

from segops.nn import CAR, HFGDHead
from tests.nn.hfgd_twin import TwinHFGD

DIRECTIONS = {"loss": Direction(2, 1.2), "training": Direction(2, 1.2), "prediction": Direction(2)}
WIDTHS, STRIDES = (256, 512, 1024, 2048), (4, 8, 16, 32)


def call_of(args: argparse.Namespace, direction: str, side: str, layout: str) -> Call:
    torch.manual_seed(0)
    head: Any = HFGDHead(WIDTHS, args.classes, output_stride=args.output_stride)
    options: dict[str, Any] = {"car": CAR(args.classes)}
    if side == "eager":
        twin = TwinHFGD(WIDTHS, args.classes, 256, 512, 64, 4, doublings=3 - args.output_stride.bit_length())
        twin.load_state_dict(head.state_dict())
        head, options = twin, {}
    head = head.to(memory_format=FORMATS[layout]).train(direction != "prediction")
    torch.manual_seed(1)  # the twin has drawn weights of its own
    batch, sides = DIRECTIONS[direction].batch, [-(-args.size // stride) for stride in STRIDES]
    features = [torch.randn(batch, width, side, side).relu() for width, side in zip(WIDTHS, sides, strict=True)]
    features = [x.to(memory_format=FORMATS[layout]) for x in features]
    target = torch.randint(args.classes, (batch, args.size, args.size))

    @torch.no_grad()
    def loss() -> dict[str, Tensor]:
        return {"loss": head.loss(features, target, **options)}

    def training() -> dict[str, Tensor]:
        # Of the maps only the coarsest has a gradient: guidance cuts the others.
        wanted = {**dict(head.named_parameters()), "features": features[-1].requires_grad_()}
        loss = head.loss(features, target, **options)
        gradients = torch.autograd.grad(loss, list(wanted.values()))
        return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}

    @torch.no_grad()
    def prediction() -> dict[str, Tensor]:
        return {"labels": head.predict(features, (args.size, args.size))}

    return {"loss": loss, "training": training, "prediction": prediction}[direction]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=513)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--output-stride", type=int, choices=(4, 2), default=4)
    title = "HFGD's head at stride {0.output_stride}, {0.size}x{0.size}, {0.classes} classes"
    run(parser, __file__, DIRECTIONS, title.format, call_of, small=65)


if __name__ == "__main__":
    main()
