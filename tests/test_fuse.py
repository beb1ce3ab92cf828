"""segops.fuse on plain-PyTorch modules of the form that other libraries have."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import segops

LENGTHS = (3, 7, 9)


class AttentionModule(nn.Module):
    """MSCA as mmsegmentation and the authors write it."""

    def __init__(self, dim, lengths=LENGTHS, **conv0):
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **conv0)
        for i, k in enumerate(lengths):
            setattr(self, f"conv{i}_1", nn.Conv2d(dim, dim, (1, k), padding=(0, k // 2), groups=dim))
            setattr(self, f"conv{i}_2", nn.Conv2d(dim, dim, (k, 1), padding=(k // 2, 0), groups=dim))
        self.conv3 = nn.Conv2d(dim, dim, 1)
        self.pairs = len(lengths)

    def forward(self, x):
        u = x.clone()
        attn = self.conv0(x)
        branches = [getattr(self, f"conv{i}_2")(getattr(self, f"conv{i}_1")(attn)) for i in range(self.pairs)]
        return self.conv3(attn + sum(branches)) * u


class WithoutGate(AttentionModule):
    def forward(self, x):
        return self.conv3(self.conv0(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6))
        self.gates = nn.ModuleList([AttentionModule(6), AttentionModule(6, (5, 11)), WithoutGate(6)])
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        x = self.stem(x)
        for gate in self.gates:
            x = x + self.dropout(gate(x))
        return {"map": x, "mean": x.mean()}


def image() -> torch.Tensor:
    return torch.randn(2, 3, 21, 30, generator=torch.Generator().manual_seed(1))


def results(model, x):
    torch.manual_seed(5)
    out = model(x)["map"]
    return out, torch.autograd.grad(
        out.square().sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
    )


def test_fused_and_back():
    model, x = Network().double(), image().double()
    before, state, classes = results(model, x), model.state_dict(), [type(gate) for gate in model.gates]
    parameters = list(model.parameters())
    model.load_state_dict(state)
    assert segops.fuse(model) == 2
    assert segops.fuse(model) == 0
    assert all(isinstance(gate, AttentionModule) for gate in model.gates)
    assert [type(gate) is cls for gate, cls in zip(model.gates, classes, strict=True)] == [False, False, True]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == state.keys()
    with segops.record() as log:
        after = results(model, x)
    assert [call.op for call in log if not call.op.endswith("backward")].count("msca") == 2
    torch.testing.assert_close(after, before)
    assert segops.unfuse(model) == 2
    assert [type(gate) for gate in model.gates] == classes
    torch.testing.assert_close(results(model, x), before)
    assert segops.unfuse(model) == 0


def test_a_module_itself_and_its_hooks():
    module, seen = AttentionModule(4), []
    module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    assert segops.fuse(module) == 1
    module(torch.randn(1, 4, 5, 6))
    assert seen == [(1, 4, 5, 6)]
    assert segops.fuse(segops.nn.MSCA(4)) == 0


def test_copies_and_pickles_stay_fused():
    model, x = Network().eval(), image()
    segops.fuse(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x)["map"], model(x)["map"])
        copied.gates[0].conv0.weight.data.zero_()
        assert model.gates[0].conv0.weight.any()
        assert segops.unfuse(copied) == 2


def hooked(module):
    module.conv1_1.register_forward_hook(lambda *args: None)


def patched(module):
    module.forward = partial(AttentionModule.forward, module)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "conv3", nn.Linear(4, 4)), "conv3 is a Linear, not a plain Conv2d"),
        (hooked, "conv1_1 has hooks"),
        (patched, "its forward was set on the instance"),
        (lambda m: setattr(m, "conv0", nn.Conv2d(4, 4, 5, padding=4, dilation=2, groups=4)), "conv0 has stride"),
        (lambda m: setattr(m, "conv0", nn.Conv2d(4, 4, 5, padding=2)), "conv0 has 4 to 4 channels in 1 groups"),
        (lambda m: setattr(m, "conv0_2", nn.Conv2d(4, 4, (3, 1), groups=4)), "conv0_2 has padding (0, 0)"),
        (lambda m: setattr(m.conv0, "padding_mode", "reflect"), "conv0 has padding (2, 2) (reflect)"),
        (lambda m: setattr(m, "conv3", nn.Conv2d(4, 4, 3, padding=1)), "conv3 has kernel (3, 3)"),
        (lambda m: setattr(m, "conv0_1", nn.Conv2d(4, 4, (1, 4), groups=4)), "conv0_1 has an even kernel (1, 4)"),
        (lambda m: setattr(m, "pairs", 2), "its forward computes something else"),
        (lambda m: setattr(m, "pairs", 4), "its forward cannot be tried: AttributeError"),
        (lambda m: m.to("meta"), "its parameters are on the meta device"),
    ],
)  # fmt: skip
def test_what_is_left_alone_and_why(change, reason, capsys):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = AttentionModule(4), AttentionModule(4)

        def forward(self, x):
            return self.first(x)

    model = Two()
    change(model.second)
    cls = type(model.second)
    assert segops.fuse(model, verify=torch.randn(1, 4, 6, 7)) == 1
    assert type(model.second) is cls
    out = capsys.readouterr().out
    assert "replaced 1 of 2 MSCA modules" in out
    assert "  replaced  first\n" in out
    assert f"  left      second: {reason}" in out


def test_verify_prints_and_leaves_no_trace(capsys):
    model, x = Network().train(), image()
    state = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    assert segops.fuse(model, verify=x) == 2
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "segops.fuse replaced 2 of 3 MSCA modules"
    assert lines[1:4] == [
        "  replaced  gates.0", "  replaced  gates.1", "  left      gates.2: its forward computes something else",
    ]  # fmt: skip
    for line, what in zip(lines[4:6], ("outputs", "gradients"), strict=True):
        words = line.split()
        assert words[:4] == ["largest", "difference", "of", f"{what}:"]
        difference, magnitude = float(words[4]), float(words[6])
        assert difference < 1e-5 * magnitude
    assert lines[6].split() == ["before", "after", "saved"]
    assert [line.split()[0] for line in lines[7:]] == ["ms", "MiB"]


def test_verify_takes_tuples_and_dicts_and_models_without_gradient(capsys):
    model = Network().eval().requires_grad_(False)
    segops.fuse(model, verify=(image(),))
    segops.unfuse(model)
    segops.fuse(model, verify={"x": image()})
    out = capsys.readouterr().out
    assert out.count("largest difference of outputs") == 2
    assert "gradients" not in out


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        segops.fuse([])
