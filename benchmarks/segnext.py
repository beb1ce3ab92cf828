"""SegNeXt with segops' ops against the same model in eager PyTorch: time and peak memory.

python benchmarks/segnext.py                                        # T, 512x512: one image, four in training
python benchmarks/segnext.py --variant b --machine xeon-2core       # and keep it in results/<machine>/segnext.json

Eager is the plain-PyTorch twin that the tests hold segops.nn.SegNeXt to: same weights, same bases. Prediction gives
labels of the image's size, logits are of the decoder's size or (full_logits) of the image's; training is a forward, the
loss and its backward.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from _models import FORMATS, Call, Direction, run
from torch import Tensor, nn

from segops.nn import SegNeXt
from tests.nn.segnext_twin import TwinHam, TwinMSCAN

DIRECTIONS = {
    "prediction": Direction(1, 1.15),
    "logits": Direction(1, 1.15),
    "full_logits": Direction(1, 1.15),
    "training": Direction(4, 1.45),
}
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
        return self.decode_head(self.backbone(image)[1:], self.bases)

    def forward(self, image: Tensor, target: Tensor | None = None) -> Any:
        logits = F.interpolate(self.logits(image), image.shape[2:], mode="bilinear")
        return logits if target is None else {"loss": F.cross_entropy(logits, target)}

    def predict(self, image: Tensor) -> Tensor:
        return self(image).argmax(1)


def call_of(args: argparse.Namespace, direction: str, side: str, layout: str) -> Call:
    torch.manual_seed(0)
    model: Any = SegNeXt(args.variant, CLASSES, bases="fixed", drop_path_rate=0.0)
    model.decode_head.dropout.p = 0.0
    model = (model if side == "segops" else Twin(model)).to(memory_format=FORMATS[layout])
    batch = DIRECTIONS[direction].batch
    torch.manual_seed(1)  # the twin has drawn weights of its own
    image = torch.randn(batch, 3, args.size, args.size).to(memory_format=FORMATS[layout])
    target = torch.randint(CLASSES, (batch, args.size, args.size))
    parameters = dict(model.named_parameters())

    def logits() -> Tensor:
        return model.decode_head(model.backbone(image)[1:]) if side == "segops" else model.logits(image)

    def training() -> dict[str, Tensor]:
        loss = model(image, target)["loss"]
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return {"loss": loss.detach(), **dict(zip(parameters, gradients, strict=True))}

    @torch.no_grad()
    def evaluation() -> dict[str, Tensor]:
        if direction == "prediction":
            return {"labels": model.predict(image)}
        return {"logits": model(image) if direction == "full_logits" else logits()}

    model.train(direction == "training")
    return training if direction == "training" else evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", choices=("t", "s", "b", "l"), default="t")
    parser.add_argument("--size", type=int, default=512)
    title = "SegNeXt-{0.variant}, {0.size}x{0.size}, {1} classes"
    run(parser, __file__, DIRECTIONS, lambda args: title.format(args, CLASSES), call_of, small=64)


if __name__ == "__main__":
    main()
