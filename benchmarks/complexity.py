"""Operations counted in the modules of segops.nn, beside the figures that the papers print.

python benchmarks/complexity.py            every table

A module runs on fake tensors: nothing is computed, hooks count what each layer would do. The convention differs by
paper and stands above each table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from segops.nn import DUpsampling, DUpsamplingDecoder

FAKE = FakeTensorMode()


@dataclass(frozen=True)
class Operations:
    """What a call does.

    Attributes:
        multiply_adds: Of convolutions, matrix products among them.
        elementwise: Bias additions and divisions of upsampling layers.
    """

    multiply_adds: int = 0
    elementwise: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.multiply_adds + other.multiply_adds, self.elementwise + other.elementwise)


@dataclass(frozen=True)
class Row:
    """One entry of a paper's table: ``ours`` counted, in 1e9, and ``paper`` as printed."""

    name: str
    ours: float
    paper: str

    @property
    def printed(self) -> str:
        """Ours at the precision of the paper."""
        return f"{self.ours:.{len(self.paper.partition('.')[2])}f}"


@dataclass(frozen=True)
class Section:
    paper: str
    convention: str
    rows: tuple[Row, ...]


def count(run: Callable[[], object], module: nn.Module) -> Operations:
    """What the layers of ``module`` do during ``run()``."""
    total = Operations()

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += RULES[type(layer)](layer, inputs[0], output)

    hooks = [layer.register_forward_hook(add) for layer in module.modules() if type(layer) in RULES]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _conv2d(layer: nn.Conv2d, x: Tensor, y: Tensor) -> Operations:
    return Operations(multiply_adds=y.numel() * layer.weight[0].numel())


def _dupsampling(layer: DUpsampling, x: Tensor, y: Tensor) -> Operations:
    cells = x.numel() // layer.in_channels
    # One division by T, and one addition where there is a bias, per logit of a whole cell, the cropped ones too.
    per_logit = 1 + (layer.bias is not None)
    return Operations(cells * layer.weight.numel(), cells * layer.weight.shape[0] * per_logit)


RULES: dict[type[nn.Module], Callable[..., Operations]] = {nn.Conv2d: _conv2d, DUpsampling: _dupsampling}


def dupsampling() -> Section:
    """Tables 2, 3 and 4 of DUpsampling (Tian et al.): the decoder on top of the 256 channels of ASPP."""
    conv1_3, b1u2c3, b3u6c3 = (128, 2), (256, 4), (1024, 16)
    efb2u1c2, mfb1u16c3 = (256, 4), (728, 16)

    def proposed(*low: tuple[int, int], **options) -> float:
        operations, _ = _decoder(low, **{"image": (513, 513), "classes": 21, "dup_channels": 64, **options})
        return _billions(operations)

    def vanilla(*low: tuple[int, int], image: tuple[int, int] = (513, 513), classes: int = 21) -> float:
        return _billions(_decoder(low, image, classes, upsampler="bilinear")[0])

    # The vanilla row with two features has the multiply-adds of the other decoder's tail on top, apparently left in
    # the graph that was counted: the projection to 64 channels and W, without bias and division.
    _, head = _decoder((), (513, 513), 21, dup_channels=64)
    left_in = 2 * _tail(head, (513, 513)).multiply_adds / 1e9
    city = {"image": (1025, 2049), "classes": 19}
    city_proposed = proposed(mfb1u16c3, dup_channels=256, **city)
    rows = (
        Row("Table 2, ResNet-50, no low-level feature", proposed(), "0.80"),
        Row("Table 2, conv1_3", proposed(conv1_3), "1.13"),
        Row("Table 2, b1u2c3", proposed(b1u2c3), "1.15"),
        Row("Table 2, b3u6c3", proposed(b3u6c3), "1.23"),
        Row("Table 2, b1u2c3 + b3u6c3", proposed(b1u2c3, b3u6c3), "1.58"),
        Row("Table 2, conv1_3 + b3u6c3", proposed(conv1_3, b3u6c3), "1.56"),
        Row("Table 3, ResNet-50, vanilla, b1u2c3 / 4", vanilla(b1u2c3), "5.53"),
        Row("Table 3, ResNet-50, proposed, b1u2c3 / 4", proposed(b1u2c3), "1.15"),
        Row("Table 3, ResNet-50, vanilla, conv1_3 / 2 + b3u6c3 / 16 [1]", vanilla(conv1_3, b3u6c3) + left_in, "22.34"),
        Row("Table 3, ResNet-50, proposed, conv1_3 / 2 + b3u6c3 / 16", proposed(conv1_3, b3u6c3), "1.56"),
        Row("Table 3, Xception-65, vanilla, efb2u1c2 / 4", vanilla(efb2u1c2), "5.53"),
        Row("Table 3, Xception-65, proposed, efb2u1c2 / 4", proposed(efb2u1c2, dup_channels=128), "1.93"),
        Row("Table 3, Xception-65, vanilla, mfb1u16c3 / 16", vanilla(mfb1u16c3), "0.41"),
        Row("Table 3, Xception-65, proposed, mfb1u16c3 / 16", proposed(mfb1u16c3, dup_channels=128), "1.98"),
        Row("Table 4, Cityscapes, vanilla, efb2u1c2 / 4", vanilla(efb2u1c2, **city), "43.65"),
        Row("Table 4, Cityscapes, proposed, mfb1u16c3 / 16 [2]", city_proposed, "25.14"),
    )
    convention = (
        "FLOPs in 1e9: 2 per multiply-add of a convolution or of W, and 1 per bias addition and per division by T of\n"
        "the DUpsampling layer. BatchNorm, ReLU, resizing and the biases of other convolutions count nothing.\n"
        "513x513 (Cityscapes: 1025x2049) makes cells of 33x33 (65x129) at stride 16.\n"
        f"[1] without the {left_in:.3f} of the DUpsampling tail, apparently left in the authors' graph: "
        f"{vanilla(conv1_3, b3u6c3):.3f}\n"
        "[2] with 256 channels under W, which the paper does not state; it is what gives its figure\n"
        "The paper leaves the fusion rounds open: ours were chosen so that these figures come out."
    )
    return Section("DUpsampling (Tian et al.), Tables 2, 3 and 4", convention, rows)


def _decoder(
    low: Sequence[tuple[int, int]], image: tuple[int, int], classes: int, **options
) -> tuple[Operations, DUpsamplingDecoder]:
    """The decoder over low-level features (channels, stride), and what its loss or prediction does for one image."""
    maps = (*low, (256, 16))
    with FAKE:
        head = DUpsamplingDecoder([c for c, _ in maps], classes, strides=[s for _, s in maps], **options).eval()
        features = [torch.empty(1, c, *_cells(image, s)) for c, s in maps]
        return count(lambda: head(features), head), head


def _tail(head: DUpsamplingDecoder, image: tuple[int, int]) -> Operations:
    tail = nn.Sequential(head.project, head.upsample)
    with FAKE:
        return count(lambda: tail(torch.empty(1, 256, *_cells(image, 16))), tail)


def _cells(image: tuple[int, int], stride: int) -> list[int]:
    return [-(-side // stride) for side in image]


def _billions(operations: Operations) -> float:
    return (2 * operations.multiply_adds + operations.elementwise) / 1e9


SECTIONS: tuple[Callable[[], Section], ...] = (dupsampling,)


def table(section: Section) -> Iterator[str]:
    width = max(len(row.name) for row in section.rows)
    yield section.paper
    yield f"{'':{width}}{'ours':>10}{'paper':>10}"
    for row in section.rows:
        mark = "" if row.printed == row.paper else "   differs"
        yield f"{row.name:{width}}{row.ours:10.3f}{row.paper:>10}{mark}"
    yield section.convention


def main() -> None:
    print("\n\n".join("\n".join(table(section())) for section in SECTIONS))


if __name__ == "__main__":
    main()
