"""segops.nn's SegNeXt family against plain-PyTorch twins that hold the same parameters under the official names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segops
from segops.nn import MSCA, MSCAN, LightHamHead, MLPHead, SegmentationModel, SegNeXt, official_state_dict

from .segnext_twin import TwinHam, TwinMLP, TwinMSCA, TwinMSCAN
from .twins import assert_same_outputs_and_gradients

SMALL = {"embed_dims": (4, 6, 8, 10), "depths": (2, 1, 1, 2), "mlp_ratios": (3, 2, 2, 1), "strip_lengths": (3, 7, 9)}
WIDTHS = (6, 8, 10)


def image_of(n=2, h=45, w=70) -> Tensor:
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(4))


def features_of(n=2, sizes=((6, 9), (3, 5), (2, 3)), widths=WIDTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, c, *size, generator=generator) for c, size in zip(widths, sizes, strict=True)]


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter and running statistic anew, so that none is 0, 1 or equal to another."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(
                    noise.abs() + 0.5 if "running_var" in name or name.endswith("bases") else 0.3 * noise + 0.2
                )
    return module


def head_of(widths=WIDTHS, classes=5, **options) -> LightHamHead:
    def norm(c):
        return nn.GroupNorm(4, c)

    return LightHamHead(widths, classes, **{"channels": 16, "rank": 3, "dropout": 0.0, "norm_layer": norm, **options})


def bases_of(d=16, r=3) -> Tensor:
    return F.normalize(torch.rand(d, r, generator=torch.Generator().manual_seed(8), dtype=torch.float64), dim=0)


modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("lengths", [(7, 11, 21), (3,), (), (3, 5, 7, 9)], ids=str)
def test_msca_twin(lengths):
    module, twin = shaken(MSCA(5, lengths)), TwinMSCA(5, lengths)
    assert_same_outputs_and_gradients(module, twin, [torch.randn(2, 5, 9, 12)], lambda m, x: m(*x))


@modes
@pytest.mark.parametrize("attention", ["msca", "lka"])
def test_mscan_twin(attention, training):
    module = shaken(MSCAN(**SMALL, attention=attention)).train(training)
    twin = TwinMSCAN(**SMALL, attention=attention).train(training)

    def call(m, x):
        return torch.cat([y.flatten(1) for y in m(*x)], 1)

    assert_same_outputs_and_gradients(module, twin, [image_of()], call)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_mscan_is_channels_last_and_describes_its_maps():
    module = MSCAN.variant("t").eval()
    with torch.no_grad():
        maps = module(image_of(1, 64, 96))
    assert [info["num_chs"] for info in module.feature_info] == [x.shape[1] for x in maps] == [32, 64, 160, 256]
    assert [info["reduction"] for info in module.feature_info] == [96 // x.shape[3] for x in maps] == [4, 8, 16, 32]
    assert all(isinstance(module.get_submodule(info["module"]), nn.LayerNorm) for info in module.feature_info)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_mscan_initialisation_and_drop_path_rates():
    module = MSCAN.variant("l")
    rates = [block.drop_path for i in range(1, 5) for block in getattr(module, f"block{i}")]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, 38))
    assert all(block.drop_path == 0 for block in MSCAN.variant("l", drop_path_rate=0.0).block3)
    weight = module.block4[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.02)
    strip = module.block3[0].attn.spatial_gating_unit.conv2_1
    assert strip.weight.std().item() == pytest.approx((2 / 21) ** 0.5, rel=0.05)
    assert not strip.bias.any()
    assert torch.equal(module.block1[0].layer_scale_1, torch.full((64,), 1e-2))


def test_drop_path_drops_a_branch_for_a_sample_and_scales_the_rest():
    torch.manual_seed(0)
    module = MSCAN(**SMALL, drop_path_rate=0.5).block4[1].train()
    module.norm1.eval(), module.norm2.eval()
    assert module.drop_path == 0.5
    with torch.no_grad():
        module.layer_scale_2.zero_()
        x = torch.randn(64, 10, 3, 4)
        added = module(x) - x
        branch = module.layer_scale_1[:, None, None] * module.attn(module.norm1(x))
        kept = added.flatten(1).abs().amax(1) > 0
        assert 20 < int(kept.sum()) < 44
        torch.testing.assert_close(added[kept], 2 * branch[kept], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(module.eval()(x) - x, branch, rtol=1e-4, atol=1e-6)


@modes
@pytest.mark.parametrize("steps", [(6, 7), (1, 0)], ids=str)
def test_light_ham_twin(steps, training):
    module = shaken(head_of(train_steps=steps[0], eval_steps=steps[1])).train(training)
    twin = TwinHam(WIDTHS, 5, 16, 4, steps=steps).train(training)
    bases = bases_of()
    assert_same_outputs_and_gradients(module, twin, features_of(), lambda m, x: m(x, bases=bases))


@modes
@pytest.mark.parametrize("context", ["nl", "cc", "ema"])
def test_contexts_twin(context, training):
    module = shaken(head_of(context=context)).train(training)
    twin = TwinHam(WIDTHS, 5, 16, 4, context).train(training)
    bases = module.context.bases.clone() if context == "ema" else None

    def call(m, x):
        if context == "ema":
            m.context.mid.requires_grad_()  # so that the twins name the same parameters
        return m(x)

    assert_same_outputs_and_gradients(module, twin, features_of(), call)
    if context == "ema":
        assert torch.equal(module.context.bases.float(), bases) is not training


def test_ema_bases_run_after_the_maps():
    module = head_of(context="ema").context.double().train()
    assert not any(p.requires_grad for p in module.mid.parameters())
    x, before = torch.rand(2, 16, 5, 6, dtype=torch.float64), module.bases.clone()
    module(x)
    v, b = module.mid(x).flatten(2), before.expand(2, -1, -1)
    for _ in range(3):
        z = (v.mT @ b).softmax(2)
        b = F.normalize(v @ (z / z.sum(1, keepdim=True)), dim=1)
    expected = 0.9 * before + 0.1 * F.normalize(b.mean(0), dim=0)
    torch.testing.assert_close(module.bases, expected)


@modes
def test_mlp_head_twin(training):
    module = shaken(MLPHead(WIDTHS, 5, channels=12, dropout=0.0)).train(training)
    assert_same_outputs_and_gradients(module, TwinMLP(WIDTHS, 5, 12).train(training), features_of(), lambda m, x: m(x))


OPTIONS = [
    {}, {"decoder": "a"}, {"decoder": "b"}, {"with_stage1": True}, {"context": "nl"}, {"context": "cc"},
    {"context": "ema"}, {"attention": "lka"}, {"grad": "one_step"}, {"bases": "fixed"}, {"in_chans": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_and_trains(options):
    torch.manual_seed(0)
    model = SegNeXt("t", 4, drop_path_rate=0.0, **options)
    image = torch.randn(2, options.get("in_chans", 3), 64, 64)
    target = (image[:, 0] > 0).long() + 2 * (image[:, 1] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        losses.append(model(image, target, ignore_index=3)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    model.eval()
    stride = {"a": 4, "b": 32}.get(options.get("decoder"), 4 if "with_stage1" in options else 8)
    assert model.decode_head.output_stride == stride
    assert model(image).shape == (2, 4, 64, 64)
    labels = model.predict(image, (50, 70))
    assert labels.shape == (2, 50, 70)
    assert labels.dtype == torch.uint8


def test_loss_and_predict_are_those_of_the_upsampled_logits():
    model = SegNeXt("t", 5, bases="fixed").eval()
    image, target = image_of(), torch.randint(5, (2, 45, 70), generator=torch.Generator().manual_seed(1))
    logits = model(image)
    losses = model(image, target, ignore_index=2)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits, target, ignore_index=2))
    assert torch.equal(losses["loss"], losses["decode"])
    wrong = model.predict(image) != logits.argmax(1)
    top = logits.topk(2, 1).values
    assert ((top[:, 0] - top[:, 1])[wrong] < 1e-4).all()


def test_random_bases_differ_and_are_made_deterministic():
    head, features = head_of().eval(), features_of()
    assert not torch.equal(head(features), head(features))
    draws = [head(features, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(head(features, bases=bases_of().float()), head(features, bases=bases_of().float()))
    torch.manual_seed(7)
    first = head(features)
    torch.manual_seed(7)
    assert torch.equal(head(features), first)
    fixed = [head_of(bases="fixed").eval() for _ in range(2)]
    fixed[1].load_state_dict(fixed[0].state_dict())
    assert torch.equal(fixed[0](features), fixed[1](features))
    assert fixed[0].state_dict().keys() == head.state_dict().keys()
    assert not torch.equal(fixed[0](features), fixed[0](features, generator=torch.Generator().manual_seed(7)))


def test_auxiliary_head_and_backbones_without_feature_info():
    class Backbone(nn.Module):
        def forward(self, image):
            return [F.avg_pool2d(image, k) for k in (4, 8)]

    model = SegmentationModel(
        Backbone(), MLPHead((3,), 4, strides=(8,), channels=8), aux_head=MLPHead((3, 3), 4, strides=(4, 8), channels=8),
        aux_weight=0.25,
    )  # fmt: skip
    image, target = image_of(), torch.randint(4, (2, 45, 70))
    losses = model(image, target)
    torch.testing.assert_close(losses["loss"], losses["decode"] + 0.25 * losses["aux"])
    assert model(image).shape == (2, 4, 45, 70)
    with pytest.raises(ValueError, match="MLPHead takes 3 maps, there are 2"):
        SegmentationModel(Backbone(), MLPHead((3, 3, 3), 4))(image)
    info = SegmentationModel(MSCAN(**SMALL), MLPHead((6, 8), 4), aux_head=MLPHead((8,), 4, strides=(16,), channels=8))
    info.decode_head.strides = (8, 16)
    assert info(image_of(2, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)).keys() == {"loss", "decode", "aux"}


def official_names(variant: str) -> set[str]:
    """Written from the description of the authors' files."""
    depths = {"t": (3, 3, 5, 2), "s": (2, 2, 4, 2), "b": (3, 3, 12, 3), "l": (3, 5, 27, 3)}[variant]

    def wb(name):
        return {f"{name}.weight", f"{name}.bias"}

    def bn(name):
        return wb(name) | {f"{name}.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")}

    names = (
        wb("patch_embed1.proj.0") | bn("patch_embed1.proj.1") | wb("patch_embed1.proj.3") | bn("patch_embed1.proj.4")
    )
    gates = ["conv0", "conv0_1", "conv0_2", "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3"]
    for i, depth in enumerate(depths, 1):
        names |= wb(f"norm{i}")
        names |= (wb(f"patch_embed{i}.proj") | bn(f"patch_embed{i}.norm")) if i > 1 else set()
        for j in range(depth):
            block = f"block{i}.{j}"
            names |= bn(f"{block}.norm1") | bn(f"{block}.norm2") | {f"{block}.layer_scale_1", f"{block}.layer_scale_2"}
            parts = ["attn.proj_1", "attn.proj_2", "mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2"]
            parts += [f"attn.spatial_gating_unit.{gate}" for gate in gates]
            for part in parts:
                names |= wb(f"{block}.{part}")
    head = wb("hamburger.ham_in.conv") | wb("conv_seg") | {"hamburger.ham_out.conv.weight"}
    head |= (
        wb("hamburger.ham_out.gn") | {"squeeze.conv.weight", "align.conv.weight"} | wb("squeeze.gn") | wb("align.gn")
    )
    return {f"backbone.{name}" for name in names} | {f"decode_head.{name}" for name in head}


@pytest.mark.parametrize("variant", "tsbl")
def test_names_are_the_official_ones(variant):
    with torch.device("meta"):
        state = SegNeXt(variant, 150).state_dict()
    assert set(state) == official_names(variant)
    width, rank = {"t": (256, 16), "s": (256, 16), "b": (512, 64), "l": (1024, 64)}[variant]
    assert state["decode_head.squeeze.conv.weight"].shape[0] == width
    with torch.device("meta"):
        assert SegNeXt(variant).decode_head.hamburger.rank == rank


def small_model() -> SegmentationModel:
    return SegmentationModel(MSCAN(**SMALL), head_of())


def test_official_state_dict_takes_every_kind_of_file():
    source, target = shaken(small_model()), small_model()
    state = source.state_dict()
    newer = {key.replace("mlp.dwconv.dwconv.", "mlp.dwconv."): w for key, w in state.items()}
    assert newer.keys() != state.keys()
    wrapped = {f"module.{key}": w for key, w in state.items()}
    for checkpoint in (state, {"state_dict": state, "meta": {}}, newer, {"model": wrapped, "epoch": 3}):
        target.load_state_dict(official_state_dict(checkpoint, target), strict=True)
        for key, weight in target.state_dict().items():
            assert torch.equal(weight, state[key]), key
    backbone = MSCAN(**SMALL)
    imagenet = {**source.backbone.state_dict(), "head.weight": torch.zeros(9, 10), "head.bias": torch.zeros(9)}
    for checkpoint in ({"state_dict": imagenet}, state, newer):
        backbone.load_state_dict(official_state_dict(checkpoint, backbone), strict=True)
        assert torch.equal(
            backbone.block2[0].mlp.dwconv.dwconv.weight, source.backbone.block2[0].mlp.dwconv.dwconv.weight
        )
    older = {key: w for key, w in imagenet.items() if not key.endswith("num_batches_tracked")}
    assert official_state_dict(older, backbone).keys() == backbone.state_dict().keys()


def test_official_state_dict_names_what_does_not_fit():
    model = small_model()
    state = model.state_dict()
    other = {key: w for key, w in state.items() if key != "backbone.norm2.weight"}
    other["decode_head.extra"] = torch.zeros(2, 3)
    other["decode_head.conv_seg.weight"] = torch.zeros(7, 16, 1, 1)
    with pytest.raises(ValueError) as error:
        official_state_dict(other, model)
    for words in (
        "does not fit SegmentationModel", "missing backbone.norm2.weight [6]", "unknown decode_head.extra [2, 3]",
        "decode_head.conv_seg.weight must be [5, 16, 1, 1], got [7, 16, 1, 1]",
    ):  # fmt: skip
        assert words in str(error.value)
    kept = official_state_dict({**state, "decode_head.conv_seg.weight": torch.zeros(7, 16, 1, 1)}, model,
                               keep=["decode_head.conv_seg"])  # fmt: skip
    assert torch.equal(kept["decode_head.conv_seg.weight"], state["decode_head.conv_seg.weight"])
    with pytest.raises(ValueError, match=r"file of the backbone alone.*for model\.backbone"):
        official_state_dict({"state_dict": model.backbone.state_dict()}, model)
    with pytest.raises(TypeError, match="must map names to tensors, got int under 'epoch'"):
        official_state_dict({"epoch": 3}, model)
    with pytest.raises(TypeError, match="got list"):
        official_state_dict([1], model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MSCAN((4, 6, 8)), "MSCAN: embed_dims must have one entry per stage"),
        (lambda: MSCAN(depths=(1, 0, 1, 1)), r"MSCAN: depths\[1\] must be at least 1, got 0"),
        (lambda: MSCAN(attention="vit"), "MSCAN: attention must be one of 'msca', 'lka', got 'vit'"),
        (lambda: MSCAN(drop_path_rate=1.0), "MSCAN: drop_path_rate must be in"),
        (lambda: MSCAN.variant("x"), "MSCAN.variant: size must be one of 't', 's', 'b', 'l', got 'x'"),
        (lambda: MSCA(4, (4,)), r"MSCA: strip_lengths\[0\] must be odd"),
        (lambda: MSCA(4)(torch.zeros(1, 5, 3, 3)), "MSCA: x must have 4 channels"),
        (lambda: MSCAN(**SMALL)(torch.zeros(1, 1, 8, 8)), "MSCAN: image must have 3 channels"),
        (lambda: SegNeXt("m"), "SegNeXt: variant must be one of"),
        (lambda: SegNeXt(decoder="d"), "SegNeXt: decoder must be one of"),
        (lambda: SegNeXt(decoder="a", with_stage1=True), "SegNeXt: with_stage1 needs decoder='c', got 'a'"),
        (lambda: SegNeXt(decoder="a", context="nl"), "SegNeXt: decoder='a' has no context"),
        (lambda: SegNeXt(num_classes=1), "num_classes must be at least 2"),
        (lambda: head_of(context="gc"), "LightHamHead: context must be one of"),
        (lambda: head_of(bases="learned"), "LightHamHead: bases must be one of"),
        (lambda: head_of(eval_steps=-1), "LightHamHead: eval_steps must be in"),
        (lambda: head_of()(features_of()[:2]), "LightHamHead: expected 3 feature maps, got 2"),
        (lambda: head_of(context="nl")(features_of(), bases=bases_of()), "bases and generator need context='ham'"),
        (lambda: head_of()(features_of(), bases=bases_of(8)), r"bases must be \[16, R\] or \[2, 16, R\], got \(8, 3\)"),
        (lambda: MLPHead((4,), 3, channels=0), "MLPHead: channels must be at least 1"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flop_counter_of_a_fused_model_is_that_of_the_unfused_one():
    from torch.utils.flop_counter import FlopCounterMode

    model, image = small_model().train(), image_of(2, 64, 64)
    target = torch.zeros(2, 64, 64, dtype=torch.long)
    counts = []
    for backend in (None, "reference"):
        with segops.use_backend(backend), FlopCounterMode(display=False) as counter:
            model(image, target)["loss"].backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiles_and_exports():
    model = small_model().eval()
    model.decode_head.hamburger.bases = bases_of().float()
    image = image_of(1, 64, 96)
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), expected)
        exported = torch.export.export(model, (image,)).module()
        torch.testing.assert_close(exported(image), expected)
