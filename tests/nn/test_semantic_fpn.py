"""SemanticFPN and UltraSemanticFPN against a plain-PyTorch twin that resizes every level on its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segops.nn import SemanticFPN, UltraSemanticFPN

from .hfgd_twin import TwinFPN
from .twins import assert_same_outputs_and_gradients

SIZES = ((17, 22), (9, 11), (5, 6), (3, 3))


def features_of(channels, sizes=SIZES, batch=2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize("output_stride", [4, 2, 1])
@pytest.mark.parametrize("neck", [SemanticFPN, UltraSemanticFPN])
def test_twin(neck, output_stride):
    widths = (3, 4, 5, 6)
    module = neck(widths, channels=6, output_stride=output_stride)
    twin = TwinFPN(widths, 6, 1 if neck is SemanticFPN else 3, last=False, doublings=3 - output_stride.bit_length())
    assert_same_outputs_and_gradients(module, twin, features_of(widths), lambda m, x: m(x))


def test_twin_with_a_last_lateral():
    widths = (3, 4, 7)
    module = SemanticFPN(widths, strides=(4, 8, 16), channels=6, lateral_last=True)
    twin = TwinFPN(widths, 6, 1, last=True)
    assert_same_outputs_and_gradients(module, twin, features_of(widths, SIZES[:3]), lambda m, x: m(x))


@pytest.mark.parametrize(
    ("output_stride", "convolutions", "size"),
    [(4, [1, 1, 2, 3], 129), (2, [2, 2, 3, 4], 257), (1, [3, 3, 4, 5], 513)],
)
def test_convolutions_and_size_of_the_paper(output_stride, convolutions, size):
    """For 513x513; each of the levels has one block more at half the stride."""
    with torch.device("meta"):
        neck = UltraSemanticFPN((256, 512, 1024, 256), output_stride=output_stride)
        features = [torch.empty(1, c, n, n) for c, n in zip((256, 512, 1024, 256), (129, 65, 33, 17), strict=True)]
        assert neck(features).shape == (1, 256, size, size)
    assert [len(level) for level in neck.levels] == convolutions
    assert [block.conv.kernel_size for block in neck.laterals] == [(3, 3)] * 3
    assert {block.conv.kernel_size for level in neck.levels for block in level} == {(3, 3)}


@pytest.mark.parametrize(("align_corners", "size"), [(True, (33, 44)), (False, (34, 44))])
def test_doubled_sides(align_corners, size):
    neck = SemanticFPN((3, 4), strides=(4, 8), channels=4, output_stride=2, align_corners=align_corners)
    assert neck(features_of((3, 4), SIZES[:2])).shape == (2, 4, *size)


def test_one_map():
    neck = SemanticFPN((4,), strides=(4,), channels=4)
    assert neck(features_of((4,), SIZES[:1])).shape == (2, 4, 17, 22)


def test_norm_layer_and_initialisation():
    neck = SemanticFPN((8, 16), strides=(4, 8), channels=16, norm_layer=lambda width: nn.GroupNorm(2, width))
    assert isinstance(neck.closing.gn, nn.GroupNorm)
    bound = (6 / (9 * 32)) ** 0.5  # Glorot's
    largest = float(neck.levels[0][0].conv.weight.detach().abs().max())
    assert 0.95 * bound < largest <= bound


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_stride": 3}, "output_stride must be strides\\[0\\]=4 over a power of two, got 3"),
        ({"output_stride": 8}, "output_stride must be strides\\[0\\]=4 over a power of two, got 8"),
        ({"channels": 8}, "without lateral_last the last map must have channels=8, got 6"),
        ({"strides": (4, 8)}, "strides must have one entry per map of in_channels"),
        ({"lateral_kernel_size": 2}, "lateral_kernel_size must be odd"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        SemanticFPN((3, 4, 5, 6), **{"channels": 6, **options})


def test_wrong_maps():
    neck = SemanticFPN((3, 4), strides=(4, 8), channels=4)
    with pytest.raises(ValueError, match="expected 2 feature maps, got 1"):
        neck(features_of((3,), SIZES[:1]))
    with pytest.raises(ValueError, match=r"features\[1\] must have 4 channels"):
        neck(features_of((3, 3), SIZES[:2]))
