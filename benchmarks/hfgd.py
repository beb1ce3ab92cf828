"""HFGD's head with its loss, on the maps that ResNet-50 makes of 513x513, against the same head in eager PyTorch.

python benchmarks/hfgd.py                                       # OS 4, 150 classes, two images
python benchmarks/hfgd.py --classes 59 --machine xeon-2core     # and keep it in results/<machine>/hfgd.json

Eager is the plain-PyTorch twin that the tests hold segops.nn.HFGDHead to: same weights, scaled_dot_product_attention,
full-size logits, CAR with one-hot matrix products. The loss is the fine and the coarse cross-entropy and CAR's three,
training is its backward too; a prediction gives labels of the image's size.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _models import FORMATS, Call, Direction, run
from torch import Tensor

from segops.nn import CAR, HFGDHead
from tests.nn.hfgd_twin import TwinHFGD

WIDTHS, STRIDES = (256, 512, 1024, 2048), (4, 8, 16, 32)
BATCH = 2
DIRECTIONS = {"loss": Direction(BATCH, 1.2), "training": Direction(BATCH, 1.2), "prediction": Direction(BATCH)}


def call_of(args: argparse.Namespace, direction: str, side: str, layout: str) -> Call:
    torch.manual_seed(0)
    head: Any = HFGDHead(WIDTHS, args.classes, output_stride=args.output_stride)
    extra: dict[str, Any] = {"car": CAR(args.classes)}
    if side == "eager":
        twin = TwinHFGD(WIDTHS, args.classes, 256, 512, 64, 4, doublings=3 - args.output_stride.bit_length())
        twin.load_state_dict(head.state_dict())
        head, extra = twin, {}
    head = head.to(memory_format=FORMATS[layout]).train(direction != "prediction")
    generator = torch.Generator().manual_seed(1)
    features = [
        torch.randn(BATCH, width, *[-(-args.size // stride)] * 2, generator=generator).relu()
        for width, stride in zip(WIDTHS, STRIDES, strict=True)
    ]
    features = [x.to(memory_format=FORMATS[layout]) for x in features]
    target = torch.randint(args.classes, (BATCH, args.size, args.size), generator=generator)

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
        return {"labels": head.predict(features, (args.size, args.size))}

    return {"loss": loss, "training": training, "prediction": prediction}[direction]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=513)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--output-stride", type=int, default=4, choices=(4, 2))
    title = "HFGD's head, OS {0.output_stride}, {0.size}x{0.size}, {0.classes} classes"
    run(parser, __file__, DIRECTIONS, title.format, call_of, small=65)


if __name__ == "__main__":
    main()
