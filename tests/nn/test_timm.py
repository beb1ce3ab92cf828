"""HFGD on backbones of timm, the optional extra ``segops[models]``."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch

from segops.nn import HFGD, SegmentationModel, SemanticFPN, UltraSemanticFPN


@pytest.fixture(scope="module")
def timm():
    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(ImportError):
        try:
            importlib.import_module("torchvision")  # timm imports it
        except RuntimeError:  # the common wheel lacks two of its ops beside a torch without CUDA
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(
    ("name", "widths"),
    [("resnet18", (64, 128, 256, 512)), ("convnext_atto", (40, 80, 160, 320))],
)
def test_hfgd_on_timm(timm, name, widths):
    """ResNet gives five maps, of which that at stride 2 is left out; ConvNeXt gives four."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, pretrained=False, features_only=True)
    model = HFGD(backbone, 5, channels=8, context_channels=16, qk_channels=4)
    assert isinstance(model, SegmentationModel)
    assert model.decode_head.in_channels == widths
    assert model.decode_head.strides == (4, 8, 16, 32)
    image, target = torch.randn(2, 3, 65, 97), torch.randint(5, (2, 65, 97))
    losses = model(image, target)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(image).shape == (2, 5, 65, 97)
    assert model.predict(image).shape == (2, 65, 97)


def test_parallel_branches_reach_the_finer_maps_alone(timm):
    """What the docstring of HFGD says of DistributedDataParallel."""
    torch.manual_seed(0)
    backbone = timm.create_model("hrnet_w18_small", pretrained=False, features_only=True)
    model = HFGD(backbone, 5, channels=8, context_channels=16, qk_channels=4)
    image, target = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    model(image, target)["loss"].backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert any(name.startswith("backbone.stage4.0.fuse_layers.0.") for name in unused)
    assert not any(name.startswith("decode_head") for name in unused)
    plain = HFGD(backbone, 5, channels=8, context_channels=16, qk_channels=4, guided=False)
    plain(image, target)["loss"].backward()
    assert all(p.grad is not None for p in plain.parameters())


@pytest.fixture
def network(timm, monkeypatch):
    """examples/network.py; examples/ is not a package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.delitem(sys.modules, "network", raising=False)
    yield importlib.import_module("network")
    sys.modules.pop("network")


@pytest.mark.parametrize("backbone", ["resnet10t", "mambaout_femto"])  # the latter's maps have the channels last
@pytest.mark.parametrize("name", ["hfgd-os4", "semanticfpn"])
def test_networks_of_the_examples_on_timm(network, name, backbone):
    torch.manual_seed(0)
    kind = network.MODELS[name]
    options = {key: {"backbone": backbone, "ignore_index": 11}[key] for key in kind.options}
    model = kind.build(5, **options).train()
    image, target = torch.rand(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    target[:, :9] = 11
    model(image, target, ignore_index=11)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.AdamW(model.parameters(), lr=1e-4).step()
    model.eval()
    assert model.logits(image).shape == (2, 5, 16, 16)
    assert model.predict(image).shape == (2, 64, 64)


def test_unknown_backbone_of_the_examples(network):
    with pytest.raises(ValueError, match=r"the backbone must be mscan-t, .* or a model of timm, got 'resnet-50'"):
        network.encoder("resnet-50")


@pytest.mark.parametrize("neck", [SemanticFPN, UltraSemanticFPN])
def test_necks_on_timm(timm, neck):
    backbone = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4))
    module = neck(backbone.feature_info.channels(), channels=16, lateral_last=True)
    assert module(backbone(torch.randn(2, 3, 65, 97))).shape == (2, 16, 17, 25)


def test_maps_are_chosen_by_their_stride(timm):
    backbone = timm.create_model("resnet18", pretrained=False, features_only=True)
    model = HFGD(backbone, 5, in_channels=(64, 128, 256), strides=(4, 8, 16), channels=8, context_channels=16)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)


def test_maps_with_the_channels_last(timm):
    """Swin, a backbone of the paper's Tables 3 and 4."""
    options = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    backbone = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, features_only=True, **options)
    model = HFGD(backbone, 5, channels=8, context_channels=16, qk_channels=4)
    assert model.decode_head.in_channels == (8, 16, 32, 64)
    image = torch.randn(2, 3, 64, 64)
    model(image, torch.randint(5, (2, 64, 64)))["loss"].backward()
    assert model.predict(image).shape == (2, 64, 64)


def test_a_classifier_is_no_backbone(timm):
    backbone = timm.create_model("resnet18", pretrained=False)
    model = HFGD(backbone, 5, in_channels=(64, 128, 256, 512), channels=8, context_channels=16)
    with pytest.raises(TypeError, match=r"must give a list of maps .*features_only=True\), got Tensor \(4, 1000\)"):
        model(torch.randn(4, 3, 64, 64))
