"""SelfAttention2d and AxialAttention2d against plain-PyTorch twins that hold the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import segops
from segops.nn import AxialAttention2d, SelfAttention2d
from segops.nn.self_attention import _stores_no_map

from .hfgd_twin import TwinAxial, TwinSelfAttention, attend
from .twins import assert_same_outputs_and_gradients


def image(channels=8, size=(5, 7), batch=2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (41, 53)], ids=str)
def test_self_attention_twin(size):
    module = SelfAttention2d(8, qk_channels=3)
    assert_same_outputs_and_gradients(module, TwinSelfAttention(8, 3), [image(size=size)], lambda m, x: m(*x))


def test_self_attention_is_not_scaled_and_its_logits_start_symmetric():
    module = SelfAttention2d(8, 12, qk_channels=16)
    assert module(image()).shape == (2, 12, 5, 7)
    assert torch.equal(module.query.weight, module.key.weight)
    assert module.query.weight.data_ptr() != module.key.weight.data_ptr()
    apart = SelfAttention2d(8, qk_channels=16, shared_querykey_weights=False)
    assert not torch.equal(apart.query.weight, apart.key.weight)
    scaled = SelfAttention2d(8, 12, qk_channels=16, scale=None)
    scaled.load_state_dict(module.state_dict())
    with torch.no_grad():
        scaled.query.weight *= 4
        scaled.query.bias *= 4
    torch.testing.assert_close(scaled(image()), module(image()))


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_self_attention_without_the_map():
    """64x64: torch allocates no tensor of 4096 * 4096 elements; what the op itself takes is in ops/test_memory.py."""
    module = SelfAttention2d(16, qk_channels=4)
    x = image(16, (64, 64), batch=1).requires_grad_()
    with _Largest() as largest:
        module(x).sum().backward()
    assert largest.numel <= 16 * 4096


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_axial_twin(heads):
    module = AxialAttention2d(8, num_heads=heads)
    assert_same_outputs_and_gradients(module, TwinAxial(8, heads), [image()], lambda m, x: m(*x))
    assert torch.equal(module.query.weight, module.key.weight)


class TwinCAA(nn.Module):
    """Query and key of an axis are one tensor; height, then width, both from the input."""

    def __init__(self, channels, qk):
        super().__init__()
        for name, width in (("query_key_height", qk), ("query_key_width", qk), ("value", channels)):
            block = nn.Module()
            block.conv, block.bn = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
            self.add_module(name, block)

    def forward(self, x):
        q_height, q_width, y = (
            block.bn(block.conv(x)).relu() for block in (self.query_key_height, self.query_key_width, self.value)
        )
        y = attend(q_height, q_height, y, "height", 1, 1.0)
        return attend(q_width, q_width, y, "width", 1, 1.0)


def test_caa_twin():
    module = AxialAttention2d.caa(8, 3)
    assert_same_outputs_and_gradients(module, TwinCAA(8, 3), [image()], lambda m, x: m(*x))


def test_sum_order_and_residual():
    x = image()
    module = AxialAttention2d(8, num_heads=2, combine="sum", residual=True)
    q, k, v = module.query(x), module.key(x), module.value(x)
    height, width = (attend(q, k, v, axis, 2, 0.5) for axis in ("height", "width"))
    torch.testing.assert_close(module(x), x + height + width)
    one = AxialAttention2d(8, num_heads=2, order=("width",))
    one.load_state_dict(module.state_dict())
    torch.testing.assert_close(one(x), width)
    turned = AxialAttention2d(8, num_heads=2, order=("width", "height"))
    turned.load_state_dict(module.state_dict())
    torch.testing.assert_close(turned(x), attend(q, k, width, "height", 2, 0.5))


def test_joint_is_the_op():
    x = image()
    module = AxialAttention2d(8, qk_channels=4, num_heads=1, scale=1.0, combine="joint")
    expected = segops.axial_attention(module.query(x), module.key(x), module.value(x), scale=1.0, combine="joint")
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("combine", ["compose", "sum"])
def test_query_and_key_per_axis(combine):
    x = image()
    module = AxialAttention2d(8, num_heads=2, combine=combine, qk_per_axis=True)
    y = attend(module.query_height(x), module.key_height(x), module.value(x), "height", 2, 0.5)
    values = y if combine == "compose" else module.value(x)
    z = attend(module.query_width(x), module.key_width(x), values, "width", 2, 0.5)
    torch.testing.assert_close(module(x), z if combine == "compose" else y + z)


def test_interleaved_merge_permutes_the_channels_as_iseg_does():
    module = AxialAttention2d(8, num_heads=4)
    other = AxialAttention2d(8, num_heads=4, merge="interleaved")
    other.load_state_dict(module.state_dict())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image().to(memory_format=memory_format)
        y = other(x)
        torch.testing.assert_close(y, module(x)[:, [0, 2, 4, 6, 1, 3, 5, 7]])
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "out_channels must be a multiple of num_heads=3, got 8"),
        ({"qk_channels": 6}, "qk_channels must be a multiple of num_heads=4, got 6"),
        ({"combine": "add"}, "combine must be one of 'compose', 'sum', 'joint', got 'add'"),
        ({"merge": "sum"}, "merge must be one of 'concat', 'interleaved', got 'sum'"),
        ({"order": ("depth",)}, "AxialAttention2d: order must be one of 'height', 'width', got 'depth'"),
        ({"order": (1, "height")}, "AxialAttention2d: order must be one of 'height', 'width', got 1"),
        ({"order": ("width", "width")}, "AxialAttention2d: order must hold 'height', 'width' or both, each once"),
        ({"combine": "joint", "qk_per_axis": True}, "excludes qk_per_axis"),
        ({"combine": "joint", "order": ("width",)}, "AxialAttention2d: combine='joint' is over both axes"),
        ({"out_channels": 4, "residual": True}, "residual needs out_channels=8 as in_channels, got 4"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        AxialAttention2d(8, **options)


@pytest.mark.parametrize("module", [AxialAttention2d(8), SelfAttention2d(8)], ids=lambda m: type(m).__name__)
def test_wrong_width(module):
    with pytest.raises(ValueError, match=r"x must have 8 channels, got \(2, 6, 5, 7\)"):
        module(image(6))


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "stores"),
    [
        ("cuda", torch.bfloat16, (64, 64, 512), False),
        ("cuda", torch.bfloat16, (60, 60, 512), True),
        ("cuda", torch.float32, (60, 60, 512), False),
        ("cuda", torch.float64, (64, 64, 512), True),
        ("cpu", torch.float32, (64, 64, 512), True),
    ],
)
def test_where_sdpa_would_store_the_map(device, dtype, widths, stores):
    with FakeTensorMode():
        row = [torch.empty(1, c, 1, 4, dtype=dtype, device=device) for c in widths]
    assert _stores_no_map(row) is not stores


@pytest.mark.parametrize("size", [(9, 11), (70, 60)], ids=str)
def test_self_attention_is_exported_for_any_size(size):
    """On both sides of 2048 pixels."""
    module = SelfAttention2d(8, qk_channels=4).eval()
    shapes = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(module, (image(size=size),), dynamic_shapes=shapes).module()
    for other in ((9, 11), (20, 23), (70, 60)):
        torch.testing.assert_close(exported(image(size=other)), module(image(size=other)))


@pytest.mark.parametrize("module", [AxialAttention2d, SelfAttention2d])
def test_scale_is_checked(module):
    with pytest.raises(TypeError, match="scale must be a number, got 'x'"):
        module(8, scale="x")
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        module(8, scale=float("nan"))


def test_order_and_normalisation_of_axial_attention():
    with pytest.raises(TypeError, match="order must be a tuple"):
        AxialAttention2d(8, order=5)
    names = set(AxialAttention2d(8, norm_layer=lambda width: nn.GroupNorm(2, width)).state_dict())
    assert "query.gn.weight" in names
