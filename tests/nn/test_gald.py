"""segops.nn.gald against plain-PyTorch twins that hold the same parameters under the same names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import segops
from segops.nn import GALDHead, LocalDistributionV2

from .twins import assert_same_outputs_and_gradients, conv_bn

WINDOW = {"kernel_size": 3, "dilation": 2}


def unfolded_attention(q: Tensor, k: Tensor, v: Tensor, size: int, dilation: int, heads: int, scale: float) -> Tensor:
    """border="zero" written with unfold and a softmax."""
    n, _, h, w = q.shape

    def taps(x: Tensor) -> Tensor:
        unfolded = F.unfold(x, size, dilation, padding=dilation * (size // 2))
        return unfolded.view(n, heads, -1, size * size, h * w)

    logits = (q.view(n, heads, -1, 1, h * w) * taps(k)).sum(2, keepdim=True) * scale
    return (logits.softmax(3) * taps(v)).sum(3).view(n, -1, h, w)


class TwinLDv2(nn.Module):
    def __init__(
        self, c_global, c_local, c, v, sources, *, size, dilation, heads=1, scale=1.0, bias=False, concat_local=True
    ):
        super().__init__()
        width = {"concat": c_global + c_local, "global": c_global, "local": c_local}
        self.sources, self.window, self.concat_local = sources, (size, dilation, heads, scale), concat_local
        self.query = nn.Conv2d(width[sources[0]], c, 1, bias=bias)
        self.key = nn.Conv2d(width[sources[1]], c, 1, bias=bias)
        self.value = nn.Conv2d(width[sources[2]], v, 1, bias=bias)

    def forward(self, x_global, x_local):
        inputs = {"concat": torch.cat([x_global, x_local], 1), "global": x_global, "local": x_local}
        convs = (self.query, self.key, self.value)
        q, k, v = (conv(inputs[s]) for conv, s in zip(convs, self.sources, strict=True))
        y = unfolded_attention(q, k, v, *self.window)
        return torch.cat([y, x_local], 1) if self.concat_local else y


class TwinHead(nn.Module):
    """GALDHead((6, 10), 5, channels=8, ga="psp", ld="v2", skip_channels=4, dropout=0) by hand."""

    def __init__(self):
        super().__init__()
        self.reduce = conv_bn(10, 8, 3)
        self.ga = nn.Module()
        self.ga.stages = nn.ModuleList(conv_bn(8, 8, 1) for _ in range(4))
        self.ga.bottleneck = conv_bn(40, 8, 3)
        self.ld = TwinLDv2(8, 8, 8, 8, ("concat",) * 3, size=3, dilation=2)
        self.fuse = conv_bn(10 + 16, 8, 3)
        self.laterals = nn.ModuleList([conv_bn(6, 4, 1)])
        self.merges = nn.ModuleList([conv_bn(12, 8, 3)])
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, features):
        def up(x, like):
            return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)

        def norm(block, x):
            return block.bn(block.conv(x))

        fine, x = features
        local = norm(self.reduce, x).relu()
        pools = [
            up(norm(s, F.adaptive_avg_pool2d(local, n)), x) for n, s in zip((1, 2, 3, 6), self.ga.stages, strict=True)
        ]
        context = norm(self.ga.bottleneck, torch.cat([*pools, local], 1)).relu()
        y = norm(self.fuse, torch.cat([x, self.ld(context, local)], 1)).relu()
        y = torch.cat([up(y, fine), norm(self.laterals[0], fine).relu()], 1)
        return self.classifier(norm(self.merges[0], y).relu())


def head_of(in_channels=(6, 10), num_classes=5, **kwargs) -> GALDHead:
    defaults = {"channels": 8, "ga": "psp", "ld": "v2", "skip_channels": 4, "dropout": 0.0, **WINDOW}
    return GALDHead(in_channels, num_classes, **{**defaults, **kwargs})


def features_of(batch=2, sizes=((13, 18), (7, 9)), channels=(6, 10), dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, c, *s, generator=generator, dtype=dtype) for c, s in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize(
    "sources",
    [("concat", "concat", "concat"), ("global", "concat", "local"), ("local", "global", "global"), ("local",) * 3],
    ids="-".join,
)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (4, 3)], ids=str)
def test_ldv2_twin(sources, size):
    module = LocalDistributionV2(
        5, 3, channels=4, value_channels=6, num_heads=2, scale=0.7, **WINDOW,
        query_from=sources[0], key_from=sources[1], value_from=sources[2],
    )  # fmt: skip
    twin = TwinLDv2(5, 3, 4, 6, sources, size=3, dilation=2, heads=2, scale=0.7)
    inputs = features_of(sizes=(size, size), channels=(5, 3))
    assert_same_outputs_and_gradients(module, twin, inputs, lambda m, x: m(*x))


def test_ldv2_bias_pads_after_the_projection():
    module = LocalDistributionV2(5, 3, channels=4, bias=True, concat_local=False, **WINDOW)
    twin = TwinLDv2(5, 3, 4, 4, ("concat",) * 3, size=3, dilation=2, bias=True, concat_local=False)
    inputs = features_of(sizes=((5, 7),) * 2, channels=(5, 3))
    assert_same_outputs_and_gradients(module, twin, inputs, lambda m, x: m(*x))


def test_ldv2_widths_and_paper_defaults():
    module = LocalDistributionV2(7, 3)
    assert (module.out_channels, module.kernel_size, module.dilation, module.scale) == (515, (5, 5), (6, 6), 1.0)
    assert module.query.weight.shape == (512, 10, 1, 1)
    assert module.query.bias is None
    assert LocalDistributionV2(7, 3, channels=4, value_channels=9, concat_local=False).out_channels == 9


def test_ldv2_scale_none_is_by_head_width():
    x = features_of(sizes=((5, 7),) * 2, channels=(5, 3))
    module = LocalDistributionV2(5, 3, channels=8, num_heads=2, scale=None, **WINDOW)
    same = LocalDistributionV2(5, 3, channels=8, num_heads=2, scale=0.5, **WINDOW)
    same.load_state_dict(module.state_dict())
    assert torch.equal(module(*x), same(*x))


@pytest.mark.parametrize("border", ["mask", "shift"])
def test_ldv2_border_reaches_the_op(border):
    x = features_of(sizes=((9, 8),) * 2, channels=(5, 3))
    module = LocalDistributionV2(5, 3, channels=4, border=border, concat_local=False, **WINDOW)
    both = torch.cat(x, 1)
    projected = [conv(both) for conv in (module.query, module.key, module.value)]
    assert torch.equal(module(*x), segops.local_attention(*projected, 3, 2, scale=1.0, border=border))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_from": "both"}, "query_from must be one of 'concat', 'global', 'local', got 'both'"),
        ({"border": "reflect"}, "border must be one of"),
        ({"channels": 6, "num_heads": 4}, "channels must be a multiple of num_heads=4, got 6"),
        ({"channels": 4, "value_channels": 3, "num_heads": 2}, "value_channels must be a multiple of num_heads=2"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
    ],
)
def test_ldv2_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        LocalDistributionV2(5, 3, **{"channels": 4, **change})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 5, 7), (2, 3, 5, 7)), "x_global must have 5 channels"),
        (((2, 5, 5, 7), (2, 5, 5, 7)), "x_local must have 3 channels"),
        (((2, 5, 5, 7), (2, 3, 5, 8)), "x_local must have x_global's batch and size"),
        (((2, 5, 5, 7), (1, 3, 5, 7)), "x_local must have x_global's batch and size"),
        (((5, 5, 7), (3, 5, 7)), r"x_global must be \[N, C, H, W\]"),
    ],
)
def test_ldv2_refuses_maps(shapes, message):
    with pytest.raises(ValueError, match=message):
        LocalDistributionV2(5, 3, channels=4)(*(torch.randn(s) for s in shapes))


@pytest.mark.parametrize("training", [True, False])
def test_head_twin(training):
    module, twin = head_of().train(training), TwinHead().train(training)
    assert_same_outputs_and_gradients(module, twin, features_of(), lambda m, x: m(x))
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)


@pytest.mark.parametrize("ga", ["psp", None])
@pytest.mark.parametrize("ld", ["v2", None])
def test_head_configurations(ga, ld):
    head = head_of((4, 6, 10), ga=ga, ld=ld)
    features = features_of(sizes=((25, 35), (13, 18), (7, 9)), channels=(4, 6, 10))
    with segops.record() as log:
        logits = head(features)
    assert logits.shape == (2, 5, 25, 35)
    assert [call.op for call in log] == (["local_attention"] if ld else [])
    head.loss(features, torch.zeros(2, 50, 70, dtype=torch.uint8)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_head_contract():
    head = head_of()
    assert (head.in_channels, head.strides, head.num_classes, head.output_stride) == ((6, 10), (4, 8), 5, 4)
    assert head_of(strides=(8, 16)).output_stride == 8
    assert head_of((10,)).strides == (8,)
    names = {name.rsplit(".", 2)[-2] for name in head.state_dict() if "classifier" not in name and "ld." not in name}
    assert names == {"conv", "bn"}
    for training in (True, False):
        logits, aux = head.train(training)(features_of(), return_aux=True)
        assert aux == {}
        assert isinstance(head(features_of()), Tensor)
        assert logits.shape == (2, 5, 13, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ga": "cgnl"}, "ga must be 'psp' or None, got 'cgnl'"),
        ({"ld": "v1"}, "ld must be 'v2' or None, got 'v1'"),
        ({"arrangement": "ldga"}, "arrangement must be 'gald', got 'ldga'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"strides": (8,)}, r"strides must have one entry per map of in_channels \(2\)"),
        ({"strides": (8, 4)}, "strides must run fine to coarse"),
        ({"in_channels": ()}, "in_channels must name at least one map"),
    ],
)
def test_head_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        head_of(**change)


def test_head_refuses_features():
    head = head_of()
    with pytest.raises(ValueError, match="expected 2 feature maps, got 3"):
        head([*features_of(), features_of()[0]])
    with pytest.raises(ValueError, match=r"features\[0\] must have 6 channels"):
        head(features_of()[::-1])


def test_head_batch_of_one():
    features = features_of(batch=1)
    assert head_of().eval()(features).shape == (1, 5, 13, 18)
    assert head_of(ga=None)(features).shape == (1, 5, 13, 18)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        head_of()(features)


@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((3, 2), (1, 1)), ((11, 5), (5, 3))], ids=str)
def test_head_odd_sizes(sizes):
    features = features_of(sizes=sizes)
    assert head_of().eval()(features).shape[2:] == sizes[0]
    assert head_of().predict(features, (17, 9)).shape == (2, 17, 9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_loss_counts_valid_pixels_only(dtype):
    head, features = head_of().eval(), features_of()
    target = torch.randint(0, 5, (2, 29, 37), generator=torch.Generator().manual_seed(1))
    target[:, :9] = 200
    full = F.interpolate(head(features), (29, 37), mode="bilinear", align_corners=True)
    weight = torch.rand(5)
    for class_weight in (None, weight):
        expected = F.cross_entropy(full, target, class_weight, ignore_index=200)
        loss = head.loss(features, target.to(dtype), ignore_index=200, class_weight=class_weight)
        torch.testing.assert_close(loss, expected)


def test_loss_without_valid_pixel_is_zero():
    head = head_of()
    loss = head.loss(features_of(), torch.full((2, 13, 18), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_loss_refuses_targets():
    head = head_of()
    with pytest.raises(ValueError, match=r"pass target.squeeze\(1\)"):
        head.loss(features_of(), torch.zeros(2, 1, 13, 18, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target must be \[N, H, W\], got 2 axes: \(13, 18\)"):
        head.loss(features_of(), torch.zeros(13, 18, dtype=torch.int64))
    with pytest.raises(TypeError, match="uint8, int16, int32 or int64"):
        head.loss(features_of(), torch.zeros(2, 13, 18))


def test_neither_loss_nor_predict_makes_full_size_logits():
    head, features = head_of(num_classes=100), features_of(sizes=((4, 5), (2, 3)))
    full = 2 * 100 * 64 * 80
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            largest = max(largest, *sizes, 0)
            return out

    with Watch():
        head.loss(features, torch.zeros(2, 64, 80, dtype=torch.uint8)).backward()
        head.predict(features, (64, 80))
    assert largest < full / 4


def test_predict_is_the_argmax_at_full_size():
    head, features = head_of().eval(), features_of()
    full = F.interpolate(head(features), (29, 37), mode="bilinear", align_corners=True)
    labels = head.predict(features, (29, 37))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), full.argmax(1))
    assert head_of(num_classes=300).eval().predict(features, (3, 4)).dtype == torch.int64


def test_state_dict_round_trip():
    first, second = head_of().eval(), head_of().eval()
    assert not torch.equal(first(features_of()), second(features_of()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(features_of()), second(features_of()))


def test_deterministic():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        head = head_of(dropout=0.1)
        loss = head.loss(features_of(), torch.ones(2, 26, 36, dtype=torch.uint8))
        loss.backward()
        runs.append([loss, *(p.grad for p in head.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
