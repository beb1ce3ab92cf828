"""One battery over the op table: op x lane x dtype x sample."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

import segops
from segops import _dispatch
from segops.testing import assert_close

from .lanes import DTYPES, every_dtype, every_lane, outputs_of

OPS = sorted(name for name in _dispatch.OPS if not name.endswith("_backward"))
FUNCTIONS = {name: getattr(importlib.import_module(f"segops.ops.{name}"), name) for name in OPS}
SAMPLES = [
    pytest.param(name, sample, id=f"{name}-{sample.name}")
    for name in OPS
    for sample in importlib.import_module(f"segops.reference.{name}").sample_inputs()
]
TINY = [param for param in SAMPLES if param.values[1].tiny]
FIRST = [
    next(param for param in TINY if param.values[0] == name and param.values[1].name != "one_pixel") for name in OPS
]

every_sample = pytest.mark.parametrize(("name", "sample"), SAMPLES)
every_tiny_sample = pytest.mark.parametrize(("name", "sample"), TINY)
first_sample = pytest.mark.parametrize(("name", "sample"), FIRST)


def run(name, sample, tensors, *, weights=None):
    """Outputs, and the gradients of their weighted sum, by name."""
    inputs = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    outputs = outputs_of(FUNCTIONS[name](**inputs, **sample.kwargs))
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    cotangents = [w.to(out.device, out.dtype) for w, out in zip(weights, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents)
    return {f"output {i}": out.detach() for i, out in enumerate(outputs)} | {
        f"gradient of {key}": gradient for key, gradient in zip(inputs, gradients, strict=True)
    }


def check(lane, name, sample, tensors, dtype):
    """Against the reference in float64 on the same numbers, with eager PyTorch's own error as the yardstick."""
    host = {key: tensor.cpu() for key, tensor in tensors.items()}
    with segops.use_backend("reference"):
        eager = run(name, sample, host)
        # The weights of the sum are what the tested dtype can hold, so that both sides differentiate the same sum.
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).double()
            for key, out in eager.items()
            if key.startswith("output")
        ]
        oracle = run(name, sample, {key: tensor.double() for key, tensor in host.items()}, weights=weights)
    with lane.active(), segops.record() as log:
        actual = run(name, sample, tensors, weights=weights)
    assert {call.backend for call in log} == {lane.backend}, log
    for key, value in actual.items():
        assert_close(key, value, oracle[key], eager[key] if dtype != torch.float64 else None)


@every_lane
@every_dtype
@every_sample
def test_forward_and_gradients(lane, dtype, name, sample):
    if lane.slow and not sample.tiny and dtype != torch.float32:
        pytest.skip("interpreted and emulated lanes take the larger samples in float32 only: they are slow")
    tensors = sample.tensors(dtype, lane.device)
    if sum(x.numel() for x in tensors.values()) > lane.largest:
        pytest.skip(f"{lane.name} takes samples of up to {lane.largest} elements: it is slow")
    check(lane, name, sample, tensors, dtype)


def channels_last(x):
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.transpose(-1, -2).contiguous().mT


def sliced(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def chunk_of_channels_last(x):
    return channels_last(torch.cat([x, x], 1)).chunk(2, 1)[1]


def expanded(x):
    return x[:, :1].expand(x.shape)


LAYOUTS = {f.__name__: f for f in (channels_last, sliced, chunk_of_channels_last, expanded)}


@every_lane
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_tiny_sample
def test_any_strides(lane, layout, dtype, name, sample):
    if lane.slow and dtype == torch.bfloat16:
        pytest.skip("interpreted and emulated lanes take the layouts in float32 only: they are slow")
    tensors = {key: LAYOUTS[layout](x) for key, x in sample.tensors(dtype, lane.device).items()}
    check(lane, name, sample, tensors, dtype)


@every_lane
@first_sample
def test_batch_of_none(lane, name, sample):
    tensors = {key: x[:0] for key, x in sample.tensors(torch.float32, lane.device).items()}
    with lane.active():
        for key, value in run(name, sample, tensors).items():
            assert value.numel() == 0, key


@every_lane
@every_tiny_sample
def test_gradcheck(lane, name, sample):
    """First and second derivatives numerically: every entry of the Jacobian on the smallest sample, else a random
    projection of it."""
    if lane.slow and sample.name not in ("smaller_than_window", "shift"):
        pytest.skip("interpreted and emulated lanes take two samples: gradcheck calls the op hundreds of times")
    tensors = [x.requires_grad_() for x in sample.tensors(torch.float64, lane.device).values()]
    function = partial(FUNCTIONS[name], **sample.kwargs)
    with lane.active():
        torch.autograd.gradcheck(function, tensors, fast_mode=lane.slow or sum(x.numel() for x in tensors) > 150)
        torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def calls_of(name, sample, tensors):
    """The op and its backward op with the arguments that a real call gives them."""
    calls = []

    class Tap(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "segops":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Tap():
        run(name, sample, tensors)
    return calls


@every_lane
@first_sample
def test_opcheck(lane, name, sample):
    tensors = sample.tensors(torch.float64 if lane.name == "cpu-base" else torch.float32, lane.device)
    with lane.active():
        if lane.backend == "reference":
            pytest.skip("the reference is eager PyTorch, not an op")
        calls = calls_of(name, sample, tensors)
        assert len(calls) == 2
        for op, args in calls:
            args = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in args]
            torch.library.opcheck(op, tuple(args))


@every_lane
@first_sample
def test_compile_fullgraph_dynamic(lane, name, sample):
    """One graph for every H and W: none is compiled after two sizes."""
    function = FUNCTIONS[name]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    with lane.active():
        torch._dynamo.reset()
        counted = torch.compile(lambda *x: function(*x, **sample.kwargs), fullgraph=True, dynamic=True, backend=count)
        compiled = torch.compile(
            lambda *x: function(*x, **sample.kwargs), fullgraph=True, dynamic=True, backend="aot_eager"
        )
        for h, w in ((9, 11), (8, 13), (12, 10), (17, 9)):
            tensors = [
                torch.randn(*x.shape[:2], h, w, device=lane.device, requires_grad=True)
                for x in sample.tensors(torch.float32).values()
            ]
            counted(*tensors)
            expected = outputs_of(function(*tensors, **sample.kwargs))
            actual = outputs_of(compiled(*tensors))
            grads = [torch.autograd.grad([o.sum() for o in outputs], tensors) for outputs in (actual, expected)]
            for a, b in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
                assert torch.equal(a, b)
    assert len(graphs) <= 2, f"{len(graphs)} graphs for four sizes"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@first_sample
def test_compile_inductor(name, sample, backward):
    torch._dynamo.reset()
    function = torch.compile(lambda *x: FUNCTIONS[name](*x, **sample.kwargs), fullgraph=True, dynamic=True)
    tensors = [x.requires_grad_(backward) for x in sample.tensors(torch.float32).values()]
    expected = outputs_of(FUNCTIONS[name](*tensors, **sample.kwargs))
    actual = outputs_of(function(*tensors))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    if backward:
        got, want = (torch.autograd.grad([o.sum() for o in outputs], tensors) for outputs in (actual, expected))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@first_sample
def test_export(name, sample):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return FUNCTIONS[name](*tensors, **sample.kwargs)

    tensors = tuple(sample.tensors(torch.float32).values())
    h, w = (torch.export.Dim(axis, min=2, max=4096) for axis in "hw")
    shapes = (tuple({2: h, 3: w} for _ in tensors),)
    program = torch.export.export(Layer(), tensors, dynamic_shapes=shapes)
    larger = [torch.randn(*x.shape[:2], x.shape[2] + 5, x.shape[3] + 3) for x in tensors]
    for a, b in zip(outputs_of(program.module()(*larger)), outputs_of(Layer()(*larger)), strict=True):
        assert torch.equal(a, b)


@every_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@first_sample
def test_autocast(lane, dtype, name, sample):
    """The user's autocast dtype reaches the op, also from inputs of mixed dtypes; float64 stays float64."""
    tensors = sample.tensors(torch.float32, lane.device)
    mixed = {key: x.to(dtype) if i else x for i, (key, x) in enumerate(tensors.items())}
    with lane.active():
        expected = outputs_of(FUNCTIONS[name](**{k: x.to(dtype) for k, x in tensors.items()}, **sample.kwargs))
        with torch.autocast(lane.device, dtype=dtype):
            actual = outputs_of(FUNCTIONS[name](**mixed, **sample.kwargs))
            double = outputs_of(FUNCTIONS[name](**{k: x.double() for k, x in tensors.items()}, **sample.kwargs))
        gradients = run_autocast(name, sample, tensors, lane.device, dtype)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert double[0].dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in gradients)


def run_autocast(name, sample, tensors, device, dtype):
    inputs = [x.detach().requires_grad_() for x in tensors.values()]
    with torch.autocast(device, dtype=dtype):
        outputs = outputs_of(FUNCTIONS[name](*inputs, **sample.kwargs))
    return torch.autograd.grad([o.float().sum() for o in outputs], inputs)


@every_lane
@every_dtype
@first_sample
def test_same_bits_on_every_run_and_any_thread_count(lane, dtype, name, sample):
    tensors = sample.tensors(dtype, lane.device)
    threads = torch.get_num_threads()
    with lane.active():
        first = run(name, sample, tensors)
        for count in (1, 3, threads):
            torch.set_num_threads(count)
            try:
                again = run(name, sample, tensors)
            finally:
                torch.set_num_threads(threads)
            for key, value in first.items():
                assert torch.equal(value, again[key]), (key, count)


def test_battery_covers_the_table():
    assert OPS, "the op table is empty"
    for name in OPS:
        assert any(param.values[0] == name for param in TINY), f"{name} has no tiny sample"
    assert set(DTYPES) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
