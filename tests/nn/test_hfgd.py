"""HFGD: the head against a plain-PyTorch twin, the gradient table of its branches, and the paper's ablations."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import segops
from segops.nn import CAR, HFGD, MSCAN, AxialAttention2d, ContextAugmentedEncoder, HFGDHead

from .hfgd_twin import TwinCAE, TwinHFGD, plain_car
from .ranks import of_two_ranks
from .twins import assert_same_outputs_and_gradients

WIDTHS, SIZES, CLASSES = (3, 4, 5, 7), ((17, 22), (9, 11), (5, 6), (3, 3)), 6


def features_of(batch=2, widths=WIDTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in zip(widths, SIZES, strict=True)]


def target_of(size=(65, 88), batch=2) -> Tensor:
    target = torch.randint(CLASSES, (batch, *size), generator=torch.Generator().manual_seed(4))
    target[:, :9, :40] = 255
    return target


def head_of(**options) -> HFGDHead:
    torch.manual_seed(0)
    return HFGDHead(WIDTHS, CLASSES, **{"channels": 8, "context_channels": 10, "qk_channels": 3, **options})


def twin_of(head: HFGDHead, doublings: int = 0) -> TwinHFGD:
    twin = TwinHFGD(WIDTHS, CLASSES, 8, 10, 3, 4, doublings)
    twin.load_state_dict(head.state_dict())
    return twin


def test_encoder_twin():
    module = ContextAugmentedEncoder(7, channels=10, out_channels=8, qk_channels=3)
    for which in range(2):
        twin = TwinCAE(7, 10, 8, 3)
        assert_same_outputs_and_gradients(module, twin, features_of()[-1:], lambda m, x, i=which: m(*x)[i])


@pytest.mark.parametrize(("output_stride", "doublings"), [(4, 0), (2, 1)])
def test_head_twin(output_stride, doublings):
    head = head_of(output_stride=output_stride)
    assert head.output_stride == output_stride
    twin = twin_of(head, doublings)
    assert_same_outputs_and_gradients(head, twin, features_of(), lambda m, x: m(x))


def test_loss_and_every_gradient_of_the_twin():
    """Fine and coarse cross-entropy and CAR's three losses."""
    head = head_of()
    twin, target = twin_of(head), target_of()
    options = {"car": CAR(CLASSES), "ignore_index": 255}
    assert_same_outputs_and_gradients(
        head, twin, features_of(), lambda m, x: m.loss(x, target, **(options if m is head else {}))
    )


def test_terms_and_their_weights():
    head, features, target = head_of().eval(), features_of(), target_of()
    logits, aux = head(features, return_aux=True)
    terms = head.losses(features, target, car=CAR(CLASSES), fine_weight=0.5, coarse_weight=3.0)
    up = {"size": target.shape[1:], "mode": "bilinear", "align_corners": True}
    fine, coarse = (F.cross_entropy(F.interpolate(z, **up), target, ignore_index=255) for z in (logits, aux["coarse"]))
    intra, c2c, c2p = plain_car(aux["car_features"], target, CLASSES)
    expected = {"fine": 0.5 * fine, "coarse": 3 * coarse, "intra": intra, "c2c": c2c, "c2p": c2p}
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(head.loss(features, target), fine + coarse)
    smooth = head.losses(features, target, label_smoothing=0.1, denominator="all")
    assert set(smooth) == {"fine", "coarse"}
    assert smooth["coarse"] != coarse


class Small(nn.Module):
    """A backbone with one parameter per map."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3, c, 1, bias=False) for c in WIDTHS)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [stage(F.adaptive_avg_pool2d(image, size)) for stage, size in zip(self.stages, SIZES, strict=True)]


# Which loss trains what (semantics 2.1): 1 = receives a gradient.
TABLE = {
    "neck and axial attention": {"fine": 1, "coarse": 0, "car": 0},
    "class kernels and trailing convolution": {"fine": 0, "coarse": 1, "car": 0},
    "encoder and backbone": {"fine": 0, "coarse": 1, "car": 1},
}


def group_of(name: str) -> str:
    if name.startswith(("decode_head.neck.", "decode_head.axial.")):
        return "neck and axial attention"
    if name.startswith(("decode_head.classifier.", "decode_head.encoder.trailing.")):
        return "class kernels and trailing convolution"
    return "encoder and backbone"


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("loss", ["fine", "coarse", "car"])
def test_gradient_table(loss, mode):
    torch.manual_seed(0)
    model = HFGD(Small(), CLASSES, in_channels=WIDTHS, channels=8, context_channels=10, qk_channels=3)
    model.train(mode == "training")
    image = torch.randn(2, 3, 65, 88, requires_grad=True)
    losses = model(image, target_of())
    term = losses["intra"] + losses["c2c"] + losses["c2p"] if loss == "car" else losses[loss]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(term, (*parameters, image), allow_unused=True)
    assert {group_of(name) for name in names} == TABLE.keys()
    for name, gradient in zip((*names, "image"), gradients, strict=True):
        # The finer stages of the backbone reach no loss but the fine one, which is cut; a key's bias shifts all the
        # logits of a query.
        finer = name.startswith("backbone.stages") and not name.startswith("backbone.stages.3")
        trained = TABLE[group_of(name)][loss] and not finer
        if trained and not name.endswith("key.bias"):
            assert gradient.abs().max() > 0, name
        elif not trained:
            assert gradient is None or not gradient.any(), name


def test_fine_logits_are_those_of_the_coarse_class_kernels():
    head, features = head_of(), features_of()
    seen: dict[str, Tensor] = {}
    head.axial.register_forward_hook(lambda module, inputs, output: seen.update(fine=output))
    head.encoder.register_forward_hook(lambda module, inputs, output: seen.update(coarse=output.features))
    logits, aux = head(features, return_aux=True)
    weight, bias = head.classifier.weight, head.classifier.bias
    torch.testing.assert_close(logits, F.conv2d(seen["fine"], weight, bias))
    torch.testing.assert_close(aux["coarse"], F.conv2d(seen["coarse"], weight, bias))
    assert torch.autograd.grad(logits.sum(), (weight, bias), retain_graph=True, allow_unused=True) == (None, None)
    (through,) = torch.autograd.grad(logits.sum(), seen["fine"], retain_graph=True)
    torch.testing.assert_close(through, weight.sum(0).expand_as(through))


@pytest.mark.parametrize("training", [True, False])
def test_coarse_logits_only_on_request(training):
    head, features = head_of().train(training), features_of()
    calls: list[int] = []
    head.classifier.register_forward_hook(lambda *_: calls.append(1))
    logits = head(features)
    assert isinstance(logits, Tensor)
    head.predict(features, (65, 88))
    assert not calls
    assert head(features, return_aux=True)[1].keys() == {"coarse", "car_features"}
    assert len(calls) == 1


ABLATIONS = [
    # Table 1: no upsampling or SFPN; Identity, ASPP, self-attention
    {"context": None, "neck": None, "guided": False, "axial_heads": None},
    {"context": "aspp", "neck": None, "guided": False, "axial_heads": None},
    {"context": "self_attention", "neck": None, "guided": False, "axial_heads": None},
    {"context": None, "neck": "sfpn", "guided": False, "axial_heads": None},
    {"context": "aspp", "neck": "sfpn", "guided": False, "axial_heads": None},
    {"context": "self_attention", "neck": "sfpn", "guided": False, "axial_heads": None},
    # Table 2: guided, without and with axial attention
    {"neck": "sfpn", "axial_heads": None},
    {"neck": "sfpn"},
    # Tables 3 and 4: U-SFPN
    {},
    {"context": None, "guided": False, "axial_heads": None},
    {"guided": False, "axial_heads": None},
    {"context": "aspp"},
    {"class_bias": False},
]


@pytest.mark.parametrize("options", ABLATIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "paper")
def test_ablations(options):
    head = head_of(**options).train()
    features = [x.requires_grad_() for x in features_of()]
    target = target_of()
    car = None if options.get("context", "") is None else CAR(CLASSES)
    terms = head.losses(features, target, car=car)
    guided = options.get("guided", True)
    assert set(terms) == {"fine", *(["coarse"] if guided else []), *(["intra", "c2c", "c2p"] if car else [])}
    size = SIZES[-1] if "neck" in options and options["neck"] is None else SIZES[0]
    assert head(features).shape == (2, CLASSES, *size)
    assert head.predict(features, (65, 88)).shape == (2, 65, 88)
    children = {name for name, child in head.named_children() if child is not None}
    assert ("axial" in children) == (options.get("axial_heads", 4) is not None)
    assert ("encoder" in children) == (options.get("context", "") is not None)
    assert (head.classifier.bias is not None) == options.get("class_bias", True)
    if "neck" in children:
        assert head.neck.laterals[0].conv.kernel_size == ((1, 1) if options.get("neck") == "sfpn" else (3, 3))
        assert len(head.neck.laterals) == (4 if "encoder" not in children else 3)
    # Without guidance one cross-entropy trains everything, the finest map among it; with it, nothing in front.
    gradients = torch.autograd.grad(terms["fine"], (features[0], head.classifier.weight), allow_unused=True)
    reached = [gradient is not None for gradient in gradients]
    assert reached == ([False, False] if guided else ["neck" in children, True])


def test_axial_attention_of_another_form():
    head = head_of(axial_layer=AxialAttention2d.caa)
    assert head.axial.query_key_height.conv.out_channels == 64
    head.loss(features_of(), target_of()).backward()
    assert all(p.grad is not None for p in head.axial.parameters())
    plain, interleaved = head_of(), head_of(axial_layer=partial(AxialAttention2d, merge="interleaved"))
    interleaved.load_state_dict(plain.state_dict())
    assert not torch.allclose(interleaved(features_of()), plain(features_of()))


def test_encoder_contexts_and_kernel_size():
    x = features_of()[-1]
    for context in ("self_attention", "aspp", None):
        encoder = ContextAugmentedEncoder(7, channels=10, out_channels=8, qk_channels=3, context=context, kernel_size=3)
        linear, features = encoder(x)
        assert (linear.shape, features.shape) == ((2, 10, 3, 3), (2, 8, 3, 3))
        assert encoder.leading[0].conv.kernel_size == (3, 3)
    twin = TwinCAE(7, 10, 8, 3)
    encoder.leading = ContextAugmentedEncoder(7, channels=10, out_channels=8, context=None).leading
    twin.attention = _Zero()
    twin.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(x), segops.nn.CAEOutput(*twin(x)))


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_model_is_backbone_head_and_car():
    torch.manual_seed(0)
    model = HFGD(MSCAN.variant("t", depths=(1, 1, 1, 1)), CLASSES, channels=8, context_channels=10, coarse_weight=0.4)
    assert model.decode_head.in_channels == (32, 64, 160, 256)
    assert model.decode_head.strides == (4, 8, 16, 32)
    image, target = torch.randn(2, 3, 64, 96), target_of((64, 96))
    losses = model(image, target)
    terms = [losses[name] for name in ("fine", "coarse", "intra", "c2c", "c2p")]
    torch.testing.assert_close(losses["loss"], sum(terms))
    model.eval()
    torch.testing.assert_close(model.loss(image, target), model(image, target)["loss"])
    logits = model(image)
    assert logits.shape == (2, CLASSES, 64, 96)
    small = model.logits(image)
    assert small.shape == (2, CLASSES, 16, 24)
    torch.testing.assert_close(logits, F.interpolate(small, (64, 96), mode="bilinear", align_corners=True))
    assert (model.predict(image) == logits.argmax(1)).double().mean() > 0.999
    with segops.record() as log:
        model(image, target)
    names = {call.op for call in log}
    assert {"axial_attention", "upsample_cross_entropy", "class_centers", "car_losses"} <= names


def test_model_options():
    options = {"in_channels": WIDTHS, "channels": 8, "context_channels": 10}
    image = torch.randn(2, 3, 65, 88)
    none = HFGD(Small(), CLASSES, car=False, ignore_index=3, **options)
    assert none.car is None
    assert set(none(image, target_of() % 256 % 4)) == {"loss", "fine", "coarse"}
    own = CAR(CLASSES, weights=(2.0, 1.0, 1.0))
    assert HFGD(Small(), CLASSES, car=own, **options).car is own
    with pytest.raises(ValueError, match="HFGD: car must have the ignore_index of the cross-entropy, 3, got 255"):
        HFGD(Small(), CLASSES, car=own, ignore_index=3, **options)
    with pytest.raises(ValueError, match="in_channels must be given for a backbone without feature_info"):
        HFGD(Small(), CLASSES)


def test_no_labelled_pixel_is_no_loss():
    head = head_of()
    features = [x.requires_grad_() for x in features_of()]
    loss = head.loss(features, torch.full((2, 65, 88), 255), car=CAR(CLASSES))
    assert loss == 0
    wanted = [*head.parameters(), features[-1]]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


def test_compiles_as_one_graph():
    head = head_of(output_stride=2).eval()
    compiled = torch.compile(head, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        features = features_of(batch)
        torch.testing.assert_close(compiled(features), head(features))


def test_training_step_compiles_as_one_graph():
    head, features, target, car = head_of(), features_of(), target_of(), CAR(CLASSES)
    start = copy.deepcopy(head.state_dict())

    def results_of(loss_of) -> list[Tensor]:
        head.load_state_dict(start)
        wanted = [*head.parameters(), features[-1].requires_grad_()]
        loss = loss_of(features, target, car=car)
        return [loss.detach(), *torch.autograd.grad(loss, wanted), *head.buffers()]

    expected = [x.clone() for x in results_of(head.loss)]
    torch.testing.assert_close(results_of(torch.compile(head.loss, fullgraph=True, backend="aot_eager")), expected)


@pytest.mark.parametrize("output_stride", [4, 2])
def test_exports_for_any_batch_and_size(output_stride):
    head = head_of(output_stride=output_stride).eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(head, (features_of(),), dynamic_shapes=([dynamic] * len(WIDTHS),)).module()
    for batch, height, width in ((2, 17, 22), (1, 32, 48), (3, 33, 20)):
        sides = [(-(-height >> i), -(-width >> i)) for i in range(4)]
        features = [torch.randn(batch, c, *size) for c, size in zip(WIDTHS, sides, strict=True)]
        torch.testing.assert_close(exported(features), head(features))


def gradients_of(model: nn.Module, part: slice) -> list[Tensor | None]:
    """Of the loss of a part of the batch."""
    image = torch.randn(2, 3, 65, 88, generator=torch.Generator().manual_seed(5)).double()
    model(image[part], target_of()[part])["loss"].backward()
    return [p.grad for p in model.parameters()]


def model_without_batch_norm() -> HFGD:
    torch.manual_seed(0)
    options = {"in_channels": WIDTHS, "channels": 8, "context_channels": 10, "norm_layer": partial(nn.GroupNorm, 1)}
    return HFGD(Small(), CLASSES, **options).double()


def gradients_of_rank(index: int) -> list[Tensor | None]:
    model = DistributedDataParallel(model_without_batch_norm(), find_unused_parameters=True)
    return gradients_of(model, slice(index, index + 1))


def test_two_ranks_are_one_process_with_both_images(tmp_path):
    """The mean of the gradients, with CAR's centres and means over both; the finer stages have none."""
    expected = gradients_of(model_without_batch_norm(), slice(2))
    assert sum(gradient is None for gradient in expected) == 3
    for found in of_two_ranks(gradients_of_rank, tmp_path):
        for actual, gradient in zip(found, expected, strict=True):
            assert (actual is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(actual, gradient)


def test_autocast_and_bfloat16():
    """Losses are float32 and near those of float32; gradients are finite."""
    head, features, target = head_of(), features_of(), target_of()
    expected = head.losses(features, target, car=CAR(CLASSES))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head.losses(features, target, car=CAR(CLASSES))
        assert head(features).dtype == torch.bfloat16
    low = head.to(torch.bfloat16).losses([x.bfloat16() for x in features], target, car=CAR(CLASSES))
    for terms in (mixed, low):
        for name, loss in expected.items():
            assert terms[name].dtype == torch.float32
            square = name in ("c2c", "c2p")  # of a mean: twice its error
            torch.testing.assert_close(terms[name], loss, rtol=0.04 if square else 0.02, atol=0)
    sum(low.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": None}, "guided needs a context and a neck, got context=None"),
        ({"neck": None, "axial_heads": None}, "guided needs a context and a neck"),
        ({"neck": None, "guided": False}, "axial attention needs a neck, got axial_heads=4 and neck=None"),
        ({"neck": "fpn"}, "neck must be one of 'usfpn', 'sfpn', got 'fpn'"),
        ({"context": "ocr"}, "context must be one of 'self_attention', 'aspp', got 'ocr'"),
        ({"axial_heads": 3}, "must be a multiple of num_heads=3, got 8"),
        ({"output_stride": 8}, "output_stride must be strides"),
        ({"strides": (4, 8, 16)}, "strides must have one entry per map"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        head_of(**options)


def test_car_must_fit_the_head():
    head = head_of()
    with pytest.raises(ValueError, match=f"HFGDHead: car must be for the head's {CLASSES} classes, got 2"):
        head.losses(features_of(), target_of(), car=CAR(2))
    with pytest.raises(ValueError, match="HFGD: car must be for the head's 5 classes, got 3"):
        HFGD(MSCAN.variant("t"), 5, car=CAR(3))
    with pytest.raises(TypeError, match=r"HFGD: car must be a segops\.nn\.CAR, got 'yes'"):
        HFGD(MSCAN.variant("t"), 5, car="yes")


def test_features_of_different_batches():
    features = features_of()
    features[1] = features[1][:1]
    with pytest.raises(ValueError, match=r"features\[1\] must be of 2 images as features\[0\] is, got 1"):
        head_of()(features)


@pytest.mark.parametrize("options", [{"kernel_size": (3, 1)}, {"kernel_size": 2}])
def test_kernel_of_the_encoder(options):
    with pytest.raises((TypeError, ValueError), match="ContextAugmentedEncoder: kernel_size must be"):
        ContextAugmentedEncoder(8, channels=8, out_channels=8, **options)


def test_car_needs_an_encoder():
    head = head_of(context=None, guided=False)
    with pytest.raises(ValueError, match="HFGDHead: car needs a head with a context, got context=None"):
        head.losses(features_of(), target_of(), car=CAR(CLASSES))
    options = {"in_channels": WIDTHS, "channels": 8, "context": None, "guided": False}
    for car in (True, CAR(CLASSES)):
        with pytest.raises(ValueError, match="HFGD: car needs a head with a context, got context=None"):
            HFGD(Small(), CLASSES, car=car, **options)
    model = HFGD(Small(), CLASSES, **options)
    assert model.car is None
    assert set(model(torch.randn(2, 3, 65, 88), target_of())) == {"loss", "fine"}


def test_car_fits_the_cross_entropy():
    options = {"car": CAR(CLASSES), "reduction": "none"}
    with pytest.raises(ValueError, match="car's losses are scalars, and reduction='none' gives one loss per pixel"):
        head_of().loss(features_of(), target_of(), **options)
    assert head_of().loss(features_of(), target_of(), reduction="none").shape == (2, 65, 88)
    with pytest.raises(ValueError, match="car must have the ignore_index of the cross-entropy, 7, got 255"):
        head_of().losses(features_of(), target_of(), car=CAR(CLASSES), ignore_index=7)


def test_training_on_meta():
    """Shapes without numbers: backbone, head, losses and gradients."""
    with torch.device("meta"):
        model = HFGD(MSCAN.variant("t"), CLASSES, output_stride=2)
        image, target = torch.empty(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.uint8)
        outputs = model.decode_head(model.backbone(image))
        losses = model(image, target)
    assert all(out.device.type == "meta" for out in (*outputs, *losses.values()))
    losses["loss"].backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters() if p.requires_grad)
