"""msca's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import segops
from segops import msca, multi_scale_strip_conv
from segops.reference.msca import sample_inputs

from .lanes import every_lane


def drawn(dtype=torch.float64, device="cpu", layout=torch.contiguous_format):
    sample = next(s for s in sample_inputs() if s.name == "prime_sizes")
    tensors = sample.tensors(dtype, device)
    return tensors | {"x": tensors["x"].contiguous(memory_format=layout)}


@every_lane
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_is_strips_then_projection_then_gate(lane, layout):
    tensors = drawn(device=lane.device, layout=layout)
    x, weight, bias = tensors["x"], tensors["proj_weight"], tensors["proj_bias"]
    with lane.active():
        out = msca(**tensors)
        square = msca(**{**tensors, "proj_weight": weight[:, :, None, None]})
    with segops.use_backend("reference"):
        s = multi_scale_strip_conv(x, tensors["weight"], tensors["bias"], tensors["strips"])
    torch.testing.assert_close(out, F.conv2d(s, weight[:, :, None, None], bias) * x, rtol=1e-10, atol=1e-10)
    assert torch.equal(square, out)


@every_lane
def test_gate_of_ones_is_the_identity(lane):
    tensors = drawn(torch.float32, lane.device)
    tensors |= {"proj_weight": torch.zeros_like(tensors["proj_weight"])}
    tensors |= {"proj_bias": torch.ones_like(tensors["proj_bias"])}
    with lane.active():
        assert torch.equal(msca(**tensors), tensors["x"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_backward_keeps_the_input_and_two_maps(layout):
    tensors = tree_map_only(torch.Tensor, torch.Tensor.requires_grad_, drawn(layout=layout))
    kept = []
    with (
        segops.use_backend("cpu"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        msca(**tensors)
    assert len({t.data_ptr() for t in kept if t.shape == tensors["x"].shape}) == 3


def test_inference_keeps_nothing():
    tensors = drawn()
    with segops.use_backend("cpu"), torch.no_grad():
        taps, biases = torch.zeros(3, 25, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
        arguments = (tensors["x"], taps, biases, tensors["proj_weight"], None, [3, 3], [3, 5], False)
        _, sums, gate = torch.ops.segops.msca(*arguments)
    assert sums.numel() == gate.numel() == 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_flops_are_those_of_the_convolutions(backward):
    tensors = tree_map_only(torch.Tensor, torch.Tensor.requires_grad_, drawn())
    counts = []
    for backend in ("cpu", "reference"):
        with segops.use_backend(backend), FlopCounterMode(display=False) as counter:
            out = msca(**tensors)
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 5, 6)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"proj_weight": torch.zeros(3, 4)}, ValueError, r"proj_weight must be \[4, 4\] or \[4, 4, 1, 1\]"),
        ({"proj_weight": torch.zeros(4, 4, 3, 3)}, ValueError, r"proj_weight must be \[4, 4\], got 4 axes"),
        ({"proj_weight": torch.zeros(4, 4).double()}, TypeError, "proj_weight must have x's dtype"),
        ({"proj_bias": torch.zeros(3)}, ValueError, r"proj_bias must be \[4\], got \(3,\)"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"x": torch.zeros(1, 4, 5, 6), "weight": torch.zeros(4, 1, 5, 5), "bias": None, "strips": []}
    with pytest.raises(error, match=f"msca: {message}"):
        msca(**{**good, "proj_weight": torch.zeros(4, 4), **change})
