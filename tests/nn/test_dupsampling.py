"""segops.nn.dupsampling, aspp and label_autoencoder against plain-PyTorch twins and compositions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segops
from segops.nn import ASPP, CompressedLabelLoss, DUpsampling, DUpsamplingDecoder, LabelAutoencoder

from .twins import assert_same_outputs_and_gradients, conv_bn


class TwinDUpsampling(nn.Module):
    """By PixelShuffle, whose channels count class, dy, dx."""

    def __init__(self, channels, classes, r, bias=True):
        super().__init__()
        rows = r * r * classes
        self.classes, self.r = classes, r
        self.weight = nn.Parameter(torch.empty(rows, channels, 1, 1))
        self.register_parameter("bias", nn.Parameter(torch.empty(rows)) if bias else None)
        self.temperature = nn.Parameter(torch.empty(1))

    def shuffled(self, rows):
        return rows.view(self.r, self.r, self.classes, -1).permute(2, 0, 1, 3).reshape(rows.shape)

    def forward(self, x, size=None):
        bias = None if self.bias is None else self.shuffled(self.bias)
        y = F.pixel_shuffle(F.conv2d(x, self.shuffled(self.weight), bias), self.r) / self.temperature
        return y if size is None else y[:, :, : size[0], : size[1]]


def separable(c_in, c_out, dilation=1):
    block = nn.Module()
    block.depthwise = conv_bn(c_in, c_in, 3, groups=c_in, dilation=dilation, padding=dilation)
    block.pointwise = conv_bn(c_in, c_out, 1)
    return block


def run(block, x):
    if hasattr(block, "depthwise"):
        return run(block.pointwise, run(block.depthwise, x))
    return block.bn(block.conv(x)).relu()


def corners(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


class TwinDecoder(nn.Module):
    """DUpsamplingDecoder((5, 6, 7), 3, strides=(2, 4, 8), channels=8, low_channels=4, dup_channels=6) by hand."""

    def __init__(self, upsampler):
        super().__init__()
        self.dup = upsampler == "dup"
        self.rounds = nn.ModuleList(nn.Module() for _ in range(2))
        for i, width in enumerate((5, 6)):
            self.rounds[i].lateral = conv_bn(width, 4, 1)
            coarse = 7 if i == (0 if self.dup else 1) else 8
            self.rounds[i].first, self.rounds[i].second = separable(coarse + 4, 8), separable(8, 8)
        self.project = nn.Conv2d(8, 6 if self.dup else 3, 1)
        self.upsample = TwinDUpsampling(6, 3, 8) if self.dup else nn.Identity()

    def forward(self, features):
        fine, middle, x = features
        if self.dup:
            steps = [(self.rounds[0], corners(fine, x)), (self.rounds[1], corners(middle, x))]
        else:
            steps = [(self.rounds[1], middle), (self.rounds[0], fine)]
        for fuse, feature in steps:
            joined = torch.cat([corners(x, feature), run(fuse.lateral, feature)], 1)
            x = run(fuse.second, run(fuse.first, joined))
        return self.upsample(self.project(x))


class TwinAutoencoder(nn.Module):
    """LabelAutoencoder(3, ..., dup_channels=4) by hand, on one-hot maps."""

    def __init__(self, stride, upsampler):
        super().__init__()
        self.stride, self.dup = stride, upsampler == "dup"
        self.stem = conv_bn(3, 64, 3, stride=2)
        widths = (64, 128, 256, 256, 256)
        strides = (2, 2, 2, stride // 16)
        self.stages = nn.ModuleList(
            conv_bn(a, b, 3, stride=s) for a, b, s in zip(widths, widths[1:], strides, strict=False)
        )
        self.project = nn.Conv2d(256, 4 if self.dup else 3, 1)
        self.upsample = TwinDUpsampling(4, 3, stride) if self.dup else nn.Identity()

    def forward(self, one_hot):
        x = run(self.stem, one_hot)
        for stage in self.stages:
            x = run(stage, x)
        x, size = self.project(x), one_hot.shape[2:]
        if self.dup:
            return self.upsample(x, size)
        return F.interpolate(x, size, mode="bilinear", align_corners=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_of(*shape: int, classes: int = 3, ignored: int | None = 255) -> Tensor:
    labels = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(4))
    if ignored is not None:
        labels[:, : shape[1] // 3, : shape[2] // 2] = ignored
    return labels


def fit_of(channels=4, classes=3, r=4, bias=True, seed=7) -> SimpleNamespace:
    rows = r * r * classes
    return SimpleNamespace(
        weight=randn(rows, channels, seed=seed), bias=randn(rows, seed=seed + 1) if bias else None,
        projection=randn(channels, rows, seed=seed + 2), num_classes=classes, scale_factor=r,
    )  # fmt: skip


def layer_of(channels=4, classes=3, r=4, **options) -> DUpsampling:
    torch.manual_seed(2)
    layer = DUpsampling(channels, classes, r, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def head_of(**options) -> DUpsamplingDecoder:
    torch.manual_seed(2)
    defaults = {"strides": (2, 4, 8), "channels": 8, "low_channels": 4}
    if options.get("upsampler") != "bilinear":
        defaults["dup_channels"] = 6
    return DUpsamplingDecoder((5, 6, 7), 3, **{**defaults, **options})


def features_of(size=(19, 13)) -> list[Tensor]:
    """Strides 2, 4 and 8 of an image of that size."""
    sizes = [[-(-side // stride) for side in size] for stride in (2, 4, 8)]
    return [randn(2, c, *s, seed=i) for i, (c, s) in enumerate(zip((5, 6, 7), sizes, strict=True))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [None, (20, 24), (17, 21)], ids=str)
def test_layer_twin(bias, size):
    module = layer_of(bias=bias, temperature=0.7)
    twin = TwinDUpsampling(4, 3, 4, bias)
    assert_same_outputs_and_gradients(module, twin, [randn(2, 4, 5, 6)], lambda m, x: m(x[0], size))


def test_pixel_order():
    layer = DUpsampling(12, 3, 2, bias=False)  # W the unit matrix: channel n of x is row n
    with torch.no_grad():
        layer.weight.copy_(torch.eye(12).view(12, 12, 1, 1))
    x = torch.zeros(1, 12, 2, 3)
    dy, dx, k = 1, 0, 2
    x[0, (dy * 2 + dx) * 3 + k, 1, 2] = 1
    assert layer(x).nonzero().tolist() == [[0, k, 2 * 1 + dy, 2 * 2 + dx]]


def test_size_513_from_33_cells():
    layer = layer_of(2, 2, 16)
    x = randn(1, 2, 33, 33)
    full = layer(x)
    assert full.shape == (1, 2, 528, 528)
    assert torch.equal(layer(x, (513, 513)), full[:, :, :513, :513])
    assert torch.equal(layer.predict(x, (513, 513)), full[:, :, :513, :513].argmax(1).to(torch.uint8))
    for size in ((512, 513), (513, 529)):
        with pytest.raises(ValueError, match=r"size must have . in \[513, 528\]"):
            layer(x, size)


def test_layer_loss_and_predict_are_the_composition():
    layer, x, target = layer_of(), randn(2, 4, 5, 6), labels_of(2, 19, 22)
    layer.temperature.data.fill_(-0.6)
    logits = layer(x, (19, 22))
    weight = torch.tensor([0.5, 2.0, 1.0])
    settings = {"label_smoothing": 0.1, "ignore_index": 255}
    expected = F.cross_entropy(logits, target, weight, **settings)
    loss = layer.loss(x, target.to(torch.int16), class_weight=weight, **settings)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(each, list(layer.parameters())) for each in (loss, expected))
    assert len(got) == 3
    torch.testing.assert_close(got, wanted)
    assert torch.equal(layer.predict(x, (19, 22)).long(), logits.argmax(1))
    assert layer_of(classes=300, r=2).predict(x).dtype == torch.int64


def test_initial_values():
    layer = DUpsampling(64, 21, 16)
    assert layer.weight.shape == (16 * 16 * 21, 64, 1, 1)
    assert abs(layer.weight.std().item() - 0.1) < 1e-3
    assert abs(layer.weight.mean().item()) < 1e-3
    assert not layer.bias.any()
    assert layer.temperature.tolist() == [1]
    assert "64, 21, 16, bias=True" in repr(layer)


@pytest.mark.parametrize("bias", [True, False])
def test_from_pixel_shuffle(bias):
    conv = nn.Conv2d(4, 3 * 16, 1, bias=bias)
    x = randn(2, 4, 3, 5)
    layer = DUpsampling.from_pixel_shuffle(conv, 4, train_w=False)
    torch.testing.assert_close(layer(x), F.pixel_shuffle(conv(x), 4), rtol=1e-6, atol=1e-6)
    assert (layer.bias is None) == (not bias)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["dy_dx_class", "dx_dy_class"])
def test_from_conv_of_public_weights(order, bias):
    """As LinZhuoChen's and Tramac's layers rearrange, and as haochange's does."""
    r, k = 4, 3
    conv = nn.Conv2d(5, r * r * k, 1, bias=bias)
    x = randn(2, 5, 3, 2)
    windows = conv(x).view(2, r, r, k, 3, 2)
    axes = (0, 3, 4, 1, 5, 2) if order == "dy_dx_class" else (0, 3, 4, 2, 5, 1)
    expected = windows.permute(axes).reshape(2, k, 3 * r, 2 * r)
    layer = DUpsampling.from_conv(conv, r, order=order, temperature=2.0)
    torch.testing.assert_close(layer(x), expected / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["dy_dx_class", "dx_dy_class", "class_dy_dx"])
def test_converters_move_every_row_once(order):
    conv = nn.Conv2d(1, 2 * 2 * 5, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(20.0).view(20, 1, 1, 1))
        conv.bias.copy_(-torch.arange(20.0))
    layer = DUpsampling.from_conv(conv, 2, order=order)
    assert layer.weight.flatten().sort().values.tolist() == list(range(20))
    assert torch.equal(layer.bias, -layer.weight.flatten())
    assert torch.equal(conv.weight.flatten(), torch.arange(20.0))


@pytest.mark.parametrize(
    ("conv", "options", "message"),
    [
        (nn.Conv2d(4, 48, 3), {}, "conv must be 1x1 with stride 1"),
        (nn.Conv2d(4, 48, 1, stride=2), {}, "conv must be 1x1 with stride 1"),
        (nn.Conv2d(4, 48, 1, padding=1), {}, "conv must be 1x1 with stride 1"),
        (nn.Conv2d(4, 48, 1, groups=2), {}, "conv must be 1x1 with stride 1"),
        (nn.Conv2d(4, 50, 1), {}, r"conv must have a multiple of 4\*4 output channels, got 50"),
        (nn.Conv2d(4, 16, 1), {}, "num_classes must be at least 2, got 1"),
        (nn.Conv2d(4, 48, 1), {"order": "class_dx_dy"}, "order must be one of 'dy_dx_class'"),
        (nn.Conv2d(4, 48, 1), {"scale_factor": 0}, "scale_factor must be at least 1, got 0"),
    ],
)
def test_from_conv_refuses(conv, options, message):
    with pytest.raises(ValueError, match=message):
        DUpsampling.from_conv(conv, **{"scale_factor": 4, "order": "class_dy_dx", **options})


def test_from_fit():
    fit = fit_of()
    layer = DUpsampling.from_fit(fit, temperature=0.5, learn_temperature=False)
    assert torch.equal(layer.weight.flatten(1), fit.weight)
    assert torch.equal(layer.bias, fit.bias)
    assert (layer.in_channels, layer.num_classes, layer.scale_factor) == (4, 3, 4)
    assert not layer.temperature.requires_grad
    assert DUpsampling.from_fit(fit, bias=False).bias is None
    assert not DUpsampling.from_fit(fit_of(bias=False)).bias.any()

    as_arrays = SimpleNamespace(**{**vars(fit), "weight": fit.weight.double().numpy(), "bias": fit.bias.numpy()})
    assert torch.equal(DUpsampling.from_fit(as_arrays).weight, layer.weight)
    with pytest.raises(ValueError, match=r"fit must have a weight \[48, 4\], got \[48, 5\]"):
        layer.load_fit(fit_of(channels=5))


@pytest.mark.parametrize("learn_temperature", [True, False])
@pytest.mark.parametrize("train_w", [True, False])
def test_what_is_trained(train_w, learn_temperature):
    layer = layer_of(train_w=train_w, learn_temperature=learn_temperature)
    assert list(layer.state_dict()) == ["weight", "bias", "temperature"]
    other = layer_of(train_w=not train_w)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    x = randn(2, 4, 5, 6).requires_grad_()
    layer.loss(x, labels_of(2, 20, 24)).backward()
    assert x.grad.any()
    for parameter, trained in ((layer.weight, train_w), (layer.bias, train_w), (layer.temperature, learn_temperature)):
        assert (parameter.grad is not None) == trained
        assert not trained or parameter.grad.any()


def test_temperature_is_learned():
    """On labels that the logits give already T falls, and the loss with it."""
    layer = layer_of(train_w=False)
    x = randn(2, 4, 5, 6)
    target = layer.predict(x)
    optimizer = torch.optim.SGD([layer.temperature], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = layer.loss(x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0 < layer.temperature.item() < 0.8
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 3, 4), {}, "in_channels must be at least 1, got 0"),
        ((4, 1, 4), {}, "num_classes must be at least 2, got 1"),
        ((4, 3, 0), {}, "scale_factor must be at least 1, got 0"),
        ((4, 3, 4), {"temperature": 0}, "temperature must be finite and not 0, got 0"),
        ((4, 3, 4), {"temperature": float("nan")}, "temperature must be finite and not 0, got nan"),
    ],
)
def test_layer_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        DUpsampling(*arguments, **options)


def test_layer_refuses_maps():
    layer = layer_of()
    for call in (layer, layer.predict, lambda x: layer.loss(x, labels_of(2, 20, 24))):
        with pytest.raises(ValueError, match="5"):
            call(randn(2, 5, 5, 6))
    with pytest.raises(ValueError, match=r"squeeze\(1\)"):
        layer.loss(randn(2, 4, 5, 6), labels_of(2, 20, 24)[:, None])
    with pytest.raises(ValueError, match=r"must be in \[0, 3\).*got 7"):
        layer.loss(randn(2, 4, 5, 6), labels_of(2, 20, 24, ignored=7))


@pytest.mark.parametrize("upsampler", ["dup", "bilinear"])
@pytest.mark.parametrize("training", [True, False])
def test_decoder_twin(upsampler, training):
    module, twin = head_of(upsampler=upsampler).train(training), TwinDecoder(upsampler).train(training)
    assert_same_outputs_and_gradients(module, twin, features_of(), lambda m, x: m(x))
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)


@pytest.mark.parametrize("upsampler", ["dup", "bilinear"])
def test_decoder_loss_and_predict_are_the_composition(upsampler):
    head, features, target = head_of(upsampler=upsampler).eval(), features_of(), labels_of(2, 19, 13)
    logits = head(features)
    if upsampler == "dup":
        assert logits.shape == (2, 3, 24, 16)
        logits = logits[:, :, :19, :13]
    else:
        assert logits.shape == (2, 3, 10, 7)
        logits = F.interpolate(logits, (19, 13), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(logits, target, ignore_index=255)
    loss = head.loss(features, target.to(torch.uint8))
    torch.testing.assert_close(loss, expected)
    parameters = [p for name, p in head.named_parameters()]
    for got, wanted in zip(*(torch.autograd.grad(each, parameters) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        head.loss(features, target, denominator="all"), expected * (target != 255).float().mean()
    )
    assert torch.equal(head.predict(features, (19, 13)).long(), logits.argmax(1))
    assert not head.predict(features, (19, 13)).requires_grad


@pytest.mark.parametrize("upsampler", ["dup", "bilinear"])
def test_decoder_contract(upsampler):
    head = head_of(upsampler=upsampler)
    assert (head.in_channels, head.strides, head.num_classes) == ((5, 6, 7), (2, 4, 8), 3)
    assert head.output_stride == (1 if upsampler == "dup" else 2)
    blocks = {name.rsplit(".", 2)[-2] for name in head.state_dict() if name.startswith("rounds")}
    assert blocks == {"conv", "bn"}
    for training in (True, False):
        logits, aux = head.train(training)(features_of(), return_aux=True)
        assert isinstance(head(features_of()), Tensor)
        assert aux["decoded"].shape == ((2, 6, 3, 2) if upsampler == "dup" else (2, 3, 10, 7))
        assert logits.shape == ((2, 3, 24, 16) if upsampler == "dup" else aux["decoded"].shape)


def test_decoder_without_low_level_feature():
    head = DUpsamplingDecoder((7,), 3, strides=(8,), dup_channels=6)
    assert [name for name, _ in head.named_parameters()] == [
        "project.weight", "project.bias", "upsample.weight", "upsample.bias", "upsample.temperature",
    ]  # fmt: skip
    assert head([randn(2, 7, 3, 2)]).shape == (2, 3, 24, 16)
    vanilla = DUpsamplingDecoder((7,), 3, strides=(8,), upsampler="bilinear")
    assert vanilla([randn(2, 7, 3, 2)]).shape == (2, 3, 3, 2)
    assert vanilla.output_stride == 8


def test_decoder_scale_factor_below_the_stride():
    head = head_of(scale_factor=4)
    assert head.output_stride == 2
    assert head(features_of()).shape == (2, 3, 12, 8)


def test_decoder_options_reach_the_layer():
    head = head_of(bias=False, temperature=0.3, learn_temperature=False, train_w=False, norm_layer=Norm)
    layer = head.upsample
    assert layer.bias is None
    assert layer.temperature.item() == pytest.approx(0.3)
    assert not layer.temperature.requires_grad
    assert not layer.weight.requires_grad
    assert head.rounds[0].first.depthwise.bn.momentum == 3e-4
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert abs(torch.cat([c.weight.flatten() for c in convolutions]).std().item() - 0.1) < 0.01


class Norm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, momentum=3e-4)


def test_decoder_align_corners_is_for_every_resize():
    for upsampler in ("dup", "bilinear"):
        first, second = (head_of(upsampler=upsampler, align_corners=each).eval() for each in (True, False))
        assert not torch.equal(first(features_of()), second(features_of()))
    assert torch.equal(second.predict(features_of(), (19, 13)).long(),
                       F.interpolate(second(features_of()), (19, 13), mode="bilinear").argmax(1))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": (4, 8)}, r"strides must have one entry per map of in_channels \(3\)"),
        ({"strides": (8, 4, 2)}, "strides must run fine to coarse"),
        ({"upsampler": "nearest"}, "upsampler must be one of 'dup', 'bilinear', got 'nearest'"),
        ({"scale_factor": 3}, "scale_factor must divide the last stride 8, got 3"),
        ({"scale_factor": 0}, "scale_factor must divide the last stride 8, got 0"),
        ({"scale_factor": 8, "upsampler": "bilinear"}, "scale_factor belongs to upsampler='dup'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"in_channels": (), "strides": ()}, "in_channels must name at least one map"),
        ({"dup_channels": 0}, "dup_channels must be at least 1, got 0"),
    ],
)
def test_decoder_refuses(change, message):
    arguments = {"in_channels": (5, 6, 7), "num_classes": 3, "strides": (2, 4, 8), **change}
    with pytest.raises(ValueError, match=message):
        DUpsamplingDecoder(**arguments)


def test_decoder_refuses_features():
    head = head_of()
    with pytest.raises(ValueError, match="expected 3 feature maps, got 2"):
        head(features_of()[:2])
    with pytest.raises(ValueError, match=r"features\[0\] must have 5 channels"):
        head.loss(features_of()[::-1], labels_of(2, 19, 13))
    with pytest.raises(ValueError, match="for 3 cells and scale_factor=8, got 25"):
        head.predict(features_of(), (25, 13))


@pytest.mark.parametrize("separable_branches", [True, False])
def test_aspp_is_its_composition(separable_branches):
    torch.manual_seed(0)
    module = ASPP(6, channels=4, rates=(1, 2), separable=separable_branches, dropout=0).eval()
    x = randn(2, 6, 7, 5)
    branches = [branch(x) for branch in module.branches]
    pooled = module.pool(x.mean((2, 3), keepdim=True)).expand(2, 4, 7, 5)
    torch.testing.assert_close(module(x), module.project(torch.cat([*branches, pooled], 1)))
    assert module.out_channels == 4
    names = {name.rsplit(".", 2)[-2] for name in module.state_dict()}
    assert names == {"conv", "bn"}
    dilated = module.branches[2].depthwise if separable_branches else module.branches[2]
    assert (dilated.conv.dilation, dilated.conv.padding) == ((2, 2), (2, 2))


def test_aspp_refuses():
    with pytest.raises(ValueError, match=r"rates\[1\] must be at least 1, got 0"):
        ASPP(6, rates=(6, 0))
    with pytest.raises(ValueError, match="x must have 6 channels"):
        ASPP(6)(randn(2, 5, 7, 5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ASPP(6)(randn(1, 6, 7, 5))


@pytest.mark.parametrize("upsampler", ["dup", "bilinear"])
@pytest.mark.parametrize("stride", [16, 32])
def test_autoencoder_twin(stride, upsampler):
    torch.manual_seed(0)
    module = LabelAutoencoder(3, output_stride=stride, upsampler=upsampler, dup_channels=4)
    twin = TwinAutoencoder(stride, upsampler)
    labels = labels_of(2, 70, 65)
    known = labels != 255
    one_hot = F.one_hot(labels * known, 3).permute(0, 3, 1, 2).double() * known[:, None]
    assert_same_outputs_and_gradients(
        module, twin, [], lambda m, _: m(labels.to(torch.uint8)) if m is module else m(one_hot)
    )
    # Training mode has moved the statistics of both alike.
    logits = module.eval()(labels)
    assert logits.shape == (2, 3, 70, 65)
    torch.testing.assert_close(module.loss(labels), F.cross_entropy(logits, labels, ignore_index=255))
    assert torch.equal(module.predict(labels).long(), logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [255, 2, -100])
def test_autoencoder_labels(dtype, ignore_index):
    if dtype == torch.uint8 and ignore_index < 0:
        labels = labels_of(2, 33, 40, ignored=None)
    else:
        labels = labels_of(2, 33, 40, classes=2 if ignore_index == 2 else 3, ignored=ignore_index)
    model = LabelAutoencoder(3, output_stride=16).eval()
    expected = model(labels.where(labels != ignore_index, 255))
    assert torch.equal(model(labels.to(dtype), ignore_index), expected)


def test_autoencoder_refuses():
    with pytest.raises(ValueError, match="output_stride must be 32 or 16, got 8"):
        LabelAutoencoder(3, output_stride=8)
    with pytest.raises(ValueError, match="upsampler must be one of"):
        LabelAutoencoder(3, upsampler="nearest")
    model = LabelAutoencoder(3)
    with pytest.raises(ValueError, match=r"squeeze\(1\)"):
        model(labels_of(2, 33, 40)[:, None])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\) or ignore_index=255, got 9"):
        model(labels_of(2, 33, 40, ignored=9))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\) or ignore_index=-100, got 156"):
        model(labels_of(2, 33, 40, ignored=156).to(torch.uint8), -100)
    with pytest.raises(TypeError, match="labels must have dtype"):
        model(torch.zeros(2, 33, 40))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_compressed_labels(dtype, bias):
    fit = fit_of(bias=bias)
    loss = CompressedLabelLoss(fit)
    target = labels_of(2, 17, 22)
    target[:, :8, :4] = 255  # two windows without a label
    known = target != 255
    one_hot = F.pad(F.one_hot(target * known, 3) * known[..., None], (0, 0, 0, 2, 0, 3)).double()
    windows = one_hot.view(2, 5, 4, 6, 4, 3).transpose(2, 3).reshape(2, 5, 6, 48)
    mean = fit.bias.double() if bias else 0
    expected = ((windows - mean) @ fit.projection.double().t()).permute(0, 3, 1, 2).float()
    compressed, labelled = loss.compress(target.to(dtype))
    torch.testing.assert_close(compressed, expected)
    assert torch.equal(labelled, windows.any(3))
    assert not labelled.all()

    x = randn(2, 4, 5, 6).requires_grad_()
    each = (x - expected).square().sum(1)[labelled]
    value = loss(x, target.to(dtype))
    torch.testing.assert_close(value, each.mean())
    (gradient,) = torch.autograd.grad(value, x)
    assert not gradient.transpose(0, 1)[:, ~labelled].any()
    nothing = loss(x, torch.full((2, 17, 22), 255))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, x)[0].any()


def test_compressed_labels_of_the_decoder():
    """Of a map without error in the regression, the layer makes W P (v - m) + m, here v itself."""
    fit = fit_of(channels=48)
    fit.projection = torch.linalg.qr(fit.projection).Q
    fit.weight = fit.projection.t().contiguous()
    target = labels_of(1, 20, 24, ignored=None)
    compressed, _ = CompressedLabelLoss(fit).compress(target)
    layer = DUpsampling.from_fit(fit)
    assert torch.equal(layer.predict(compressed).long(), target)
    torch.testing.assert_close(layer(compressed), F.one_hot(target, 3).permute(0, 3, 1, 2).float(), rtol=0, atol=1e-5)


def test_compressed_labels_refuse():
    fit = fit_of()
    loss = CompressedLabelLoss(fit)
    with pytest.raises(ValueError, match=r"x must be \[2, 4, 5, 6\] for a target \[2, 17, 22\], got \[2, 4, 5, 5\]"):
        loss(randn(2, 4, 5, 5), labels_of(2, 17, 22))
    with pytest.raises(ValueError, match="x must have 4 channels"):
        loss(randn(2, 5, 5, 6), labels_of(2, 17, 22))
    with pytest.raises(ValueError, match=r"target must be in \[0, 3\)"):
        loss(randn(2, 4, 5, 6), labels_of(2, 17, 22, ignored=4))
    fit.scale_factor = 8
    with pytest.raises(ValueError, match=r"fit.projection must be \[C, 192\] for 3 classes and scale_factor=8"):
        CompressedLabelLoss(fit)


def test_state_dict_round_trip_and_determinism():
    first, second = head_of(), DUpsamplingDecoder((5, 6, 7), 3, strides=(2, 4, 8), channels=8, low_channels=4,
                                                  dup_channels=6)  # fmt: skip
    features, target = features_of(), labels_of(2, 19, 13)
    second.load_state_dict(first.state_dict())
    results = []
    for head in (first, second):
        loss = head.loss(features, target)
        loss.backward()
        results.append([loss, *(p.grad for p in head.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ops_that_run():
    head, features = head_of(), features_of()
    with segops.record() as log:
        head.loss(features, labels_of(2, 19, 13))
        head.predict(features, (19, 13))
    assert [call.op for call in log] == ["dupsample_cross_entropy", "dupsample_argmax"]
    head = head_of(upsampler="bilinear")
    with segops.record() as log:
        head.loss(features, labels_of(2, 19, 13))
        head.predict(features, (19, 13))
    assert [call.op for call in log] == ["upsample_cross_entropy", "upsample_argmax"]
