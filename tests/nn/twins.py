"""A module against a plain-PyTorch twin that holds the same parameters under the same names."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(c_in: int, c_out: int, k: int, **conv) -> nn.Module:
    block = nn.Module()
    block.conv = nn.Conv2d(c_in, c_out, k, **{"padding": k // 2, "bias": False, **conv})
    block.bn = nn.BatchNorm2d(c_out)
    return block


def assert_same_outputs_and_gradients(module: nn.Module, twin: nn.Module, inputs: list[Tensor], call) -> None:
    """In float64, with the same state_dict."""
    twin.load_state_dict(module.state_dict())
    module, twin = module.double(), twin.double()
    results = []
    for each in (module, twin):
        leaves = [x.double().requires_grad_() for x in inputs]
        out = call(each, leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        wanted = {**{f"input {i}": x for i, x in enumerate(leaves)}, **dict(each.named_parameters())}
        gradients = torch.autograd.grad((out * weights).sum(), list(wanted.values()), allow_unused=True)
        results.append({"out": out, **dict(zip(wanted, gradients, strict=True))})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        if expected is None:
            expected = torch.zeros_like(results[0][name]) if results[0][name] is not None else None
        torch.testing.assert_close(results[0][name], expected, msg=lambda text, name=name: f"{name}: {text}")
