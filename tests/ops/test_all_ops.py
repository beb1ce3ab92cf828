"""One battery over the op table: op x lane x dtype x sample."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import segops
from segops import _dispatch
from segops.reference._sample import Labels, Uniform
from segops.testing import TOLERANCES, assert_close

from .lanes import DTYPES, every_lane, outputs_of

OPS = sorted(name for name in _dispatch.OPS if not name.endswith("_backward"))
FUNCTIONS = {name: getattr(importlib.import_module(f"segops.ops.{name}"), name) for name in OPS}


def differentiable(sample):
    return tuple(sample.shapes) if sample.differentiable is None else sample.differentiable


def floats(sample):
    return any(not isinstance(spec, Labels) for spec in sample.shapes.values())


def dtypes_of(sample, dtypes=DTYPES):
    return dtypes if floats(sample) else [torch.float32]


def short(dtype):
    return str(dtype).removeprefix("torch.")


def cases(pairs, dtypes=DTYPES):
    """Every sample in every dtype, and label maps without floats once."""
    return pytest.mark.parametrize(
        ("name", "sample", "dtype"),
        [
            pytest.param(name, sample, dtype, id=f"{name}-{sample.name}-{short(dtype)}")
            for name, sample in pairs
            for dtype in dtypes_of(sample, dtypes)
        ],
    )


def samples(pairs):
    ids = [f"{name}-{sample.name}" for name, sample in pairs]
    return pytest.mark.parametrize(("name", "sample"), pairs, ids=ids)


SAMPLES = [
    (name, sample) for name in OPS for sample in importlib.import_module(f"segops.reference.{name}").sample_inputs()
]
TINY = [(name, sample) for name, sample in SAMPLES if sample.tiny]
FIRST = [next(pair for pair in TINY if pair[0] == name and pair[1].name != "one_pixel") for name in OPS]
WITH_GRADIENT = [(name, sample) for name, sample in TINY if differentiable(sample)]
FIRST_WITH_GRADIENT = [pair for pair in FIRST if pair in WITH_GRADIENT]
FEW = [pair for pair in WITH_GRADIENT if pair[1].name in ("smaller_than_window", "cropped", "corners", "per_image")]
FEW += [pair for pair in FIRST_WITH_GRADIENT if pair[0] not in {name for name, _ in FEW}]
DIFFERENTIABLE = [(name, sample) for name, sample in SAMPLES if differentiable(sample)]


def apply(function, tensors):
    """To every tensor, those in lists too."""
    return tree_map_only(torch.Tensor, function, tensors)


def as_float(dtype):
    return lambda x: x.to(dtype) if x.is_floating_point() else x


def leaves(sample, tensors):
    """The tensors anew, of which the differentiable ones require a gradient, and these by name."""
    inputs = apply(torch.Tensor.detach, tensors)
    wanted = {}
    for key in differentiable(sample):
        found = [x.requires_grad_() for x in tree_leaves(inputs[key]) if x is not None]
        wanted |= {key if len(found) == 1 else f"{key} {i}": x for i, x in enumerate(found)}
    return inputs, wanted


def moving(outputs):
    """Those that have a gradient: counts, for one, have none."""
    return [out for out in outputs if out.requires_grad]


def run(name, sample, tensors, *, weights=None):
    """Outputs, and the gradients of their weighted sum, by name."""
    inputs, wanted = leaves(sample, tensors)
    outputs = outputs_of(FUNCTIONS[name](**inputs, **sample.kwargs))
    values = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if not wanted:
        assert not any(out.requires_grad for out in outputs)
        return values
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    pairs = zip(weights, outputs, strict=True)
    cotangents = [w.to(out.device, out.dtype) for w, out in pairs if out.requires_grad]
    gradients = torch.autograd.grad(moving(outputs), list(wanted.values()), cotangents)
    return values | {f"gradient of {key}": gradient for key, gradient in zip(wanted, gradients, strict=True)}


def scores_of_dupsample(sample, tensors):
    kwargs = {key: value for key, value in sample.kwargs.items() if key != "return_confidence"}
    return segops.dupsample(**tensors, **kwargs)


def scores_of_upsample(sample, tensors):
    logits, corners = tensors["logits"], sample.kwargs.get("align_corners", False)
    maps = logits if isinstance(logits, list) else [logits]
    size = sample.kwargs.get("size") or [int(x * sample.kwargs["scale_factor"]) for x in maps[0].shape[2:]]
    maps = [torch.nn.functional.interpolate(z, size, mode="bilinear", align_corners=corners) for z in maps]
    return maps[0] if len(maps) == 1 else torch.stack([z.softmax(1) for z in maps]).mean(0)


SCORES = {"dupsample_argmax": scores_of_dupsample, "upsample_argmax": scores_of_upsample}


def assert_labels(key, labels, oracle, scores, dtype):
    """The oracle's labels, but where the dtype's tolerance cannot tell its score of the two classes apart."""
    assert labels.dtype == oracle.dtype
    wrong = labels.cpu() != oracle
    if wrong.any():
        assert scores is not None, f"{key}: {int(wrong.sum())} of {wrong.numel()} differ"
        assert int(labels.max()) < scores.shape[1], f"{key}: no such class as {int(labels.max())}"
        best = scores.amax(1)
        lost = best - scores.gather(1, labels.cpu().long().unsqueeze(1)).squeeze(1)
        tolerance = TOLERANCES[dtype]
        excess = (lost - tolerance.atol - tolerance.rtol * best.abs())[wrong]
        assert (excess <= 0).all(), f"{key}: {int((excess > 0).sum())} of {wrong.numel()} differ"


def check(lane, name, sample, tensors, dtype):
    """Against the reference in float64 on the same numbers, with eager PyTorch's own error as the yardstick."""
    host = apply(torch.Tensor.cpu, tensors)
    double = apply(as_float(torch.float64), host)
    with segops.use_backend("reference"):
        eager = run(name, sample, host)
        # The weights of the sum are what the tested dtype can hold, so that both sides differentiate the same sum.
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).double()
            for key, out in eager.items()
            if key.startswith("output")
        ]
        oracle = run(name, sample, double, weights=weights)
        scores = SCORES[name](sample, double) if name in SCORES else None
    with lane.active(), segops.record() as log:
        actual = run(name, sample, tensors, weights=weights)
    assert {call.backend for call in log} == {lane.backend}, log
    for key, value in actual.items():
        if value.is_floating_point():
            assert_close(key, value, oracle[key], eager[key] if dtype != torch.float64 else None)
        else:
            assert_labels(key, value, oracle[key], scores, dtype)


def size_of(tensors):
    return sum(x.numel() for x in tree_leaves(tensors) if x is not None)


@every_lane
@cases(SAMPLES)
def test_forward_and_gradients(lane, dtype, name, sample):
    if lane.slow and not sample.tiny and dtype != torch.float32:
        pytest.skip("interpreted and emulated lanes take the larger samples in float32 only: they are slow")
    tensors = sample.tensors(dtype, lane.device)
    if size_of(tensors) > lane.largest:
        pytest.skip(f"{lane.name} takes samples of up to {lane.largest} elements: it is slow")
    check(lane, name, sample, tensors, dtype)


def channels_last(x):
    if x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    return x.transpose(-1, -2).contiguous().mT if x.dim() > 1 else x


def sliced(x):
    if x.dim() == 0:
        return x
    hole = torch.nan if x.is_floating_point() else 250
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), hole, dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def chunk_of_channels_last(x):
    return channels_last(torch.cat([x, x], 1)).chunk(2, 1)[1] if x.dim() > 1 else x


def expanded(x):
    return x[:, :1].expand(x.shape) if x.dim() > 1 else x


LAYOUTS = {f.__name__: f for f in (channels_last, sliced, chunk_of_channels_last, expanded)}


@every_lane
@pytest.mark.parametrize("layout", LAYOUTS)
@cases(TINY, [torch.float32, torch.bfloat16])
def test_any_strides(lane, layout, dtype, name, sample):
    if lane.slow and dtype == torch.bfloat16:
        pytest.skip("interpreted and emulated lanes take the layouts in float32 only: they are slow")
    check(lane, name, sample, apply(LAYOUTS[layout], sample.tensors(dtype, lane.device)), dtype)


def is_map(key, spec):
    if key in ("weight", "proj_weight", "strips"):
        return False
    return isinstance(spec, (Labels, list)) or (spec is not None and len(getattr(spec, "shape", spec)) == 4)


def far_apart(x):
    """The same values, in channels or rows that lie 2^31 elements apart in one untouched allocation: only the pages
    that are read exist."""
    x = x.to(torch.bfloat16 if x.is_floating_point() else torch.uint8)
    stride = (2**31 + 2**10) // (x.shape[1] - 1)
    strides = [stride if axis == 1 else s for axis, s in enumerate(x.contiguous().stride())]
    storage = torch.empty(2**31 + 2**12, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, strides).copy_(x)


@every_lane
@samples(FIRST)
def test_offsets_beyond_2_31(lane, name, sample):
    torch.use_deterministic_algorithms(False)  # or the whole allocation would be filled with NaN
    if lane.device == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    tensors = sample.tensors(torch.bfloat16, lane.device)
    check(
        lane,
        name,
        sample,
        {key: far_apart(x) if is_map(key, sample.shapes[key]) else x for key, x in tensors.items()},
        torch.bfloat16,
    )


@every_lane
@samples(FIRST)
def test_batch_of_none(lane, name, sample):
    tensors = sample.tensors(torch.float32, lane.device)
    none = {key: x[:0] if is_map(key, sample.shapes[key]) else x for key, x in tensors.items()}
    with lane.active():
        for key, value in run(name, sample, none).items():
            assert not value.any(), key


def of_leaves(name, sample, tensors):
    """The op as a function of the tensors that have a gradient, of the outputs that have one; and these tensors."""
    inputs, wanted = leaves(sample, tensors)
    flat, structure = tree_flatten(inputs)
    kept = [out.requires_grad for out in outputs_of(FUNCTIONS[name](**inputs, **sample.kwargs))]

    def function(*tensors):
        anew = {id(old): new for old, new in zip(wanted.values(), tensors, strict=True)}
        outputs = FUNCTIONS[name](**tree_unflatten([anew.get(id(x), x) for x in flat], structure), **sample.kwargs)
        return tuple(out for out, moves in zip(outputs_of(outputs), kept, strict=True) if moves)

    return function, list(wanted.values())


@every_lane
@samples(WITH_GRADIENT)
def test_gradcheck(lane, name, sample):
    """First and second derivatives numerically: every entry of the Jacobian on the smallest sample, else a random
    projection of it."""
    if lane.slow and (name, sample) not in FEW:
        pytest.skip("interpreted and emulated lanes take few samples: gradcheck calls the op hundreds of times")
    with lane.active():
        function, tensors = of_leaves(name, sample, sample.tensors(torch.float64, lane.device))
        torch.autograd.gradcheck(function, tensors, fast_mode=lane.slow or sum(x.numel() for x in tensors) > 150)
        torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def detached(tensors):
    return tuple(x.detach() for x in tensors)


def drawn_like(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in tensors)


def pulled_back(function, tensors):
    """A random cotangent of the outputs, and the gradients of their sum weighted by it, in reverse mode."""
    outputs = function(*tensors)
    cotangents = drawn_like(outputs, 1)
    return cotangents, torch.autograd.grad(outputs, tensors, cotangents)


def assert_same_product(tangents, cotangents, directions, gradients):
    """<cotangent, J direction> = <J^T cotangent, direction>."""
    forward = sum((t * c).sum() for t, c in zip(tangents, cotangents, strict=True))
    reverse = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(forward, reverse)


@pytest.mark.filterwarnings("ignore:.* differentiates the reference only")
@samples(DIFFERENTIABLE)
def test_forward_mode(name, sample):
    """A product with the Jacobian is the one of reverse mode, and is never lost in silence."""
    function, tensors = of_leaves(name, sample, sample.tensors(torch.float64))
    cotangents, gradients = pulled_back(function, tensors)
    directions = drawn_like(tensors, 2)
    _, tangents = torch.func.jvp(function, detached(tensors), directions)
    assert_same_product(tangents, cotangents, directions, gradients)
    for primals in (detached(tensors), tensors):
        with forward_ad.dual_level():
            outputs = function(*map(forward_ad.make_dual, primals, directions))
            tangents = [forward_ad.unpack_dual(out).tangent for out in outputs]
        assert_same_product(tangents, cotangents, directions, gradients)


@pytest.mark.filterwarnings("ignore:.* differentiates the reference only")
@samples(DIFFERENTIABLE)
def test_functional_gradient(name, sample):
    function, tensors = of_leaves(name, sample, sample.tensors(torch.float64))
    cotangents, gradients = pulled_back(function, tensors)
    _, pull = torch.func.vjp(function, *detached(tensors))
    for a, b in zip(pull(cotangents), gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.* differentiates the reference only")
@samples(FIRST_WITH_GRADIENT)
def test_functional_second_derivative(name, sample):
    """Forward over reverse."""
    function, tensors = of_leaves(name, sample, sample.tensors(torch.float64))
    cotangents = drawn_like(function(*tensors), 1)
    directions = drawn_like(tensors, 2)

    def loss(*tensors):
        return sum((out * c).sum() for out, c in zip(function(*tensors), cotangents, strict=True))

    gradients = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    expected = torch.autograd.grad(gradients, tensors, directions, materialize_grads=True)
    gradient = torch.func.grad(loss, tuple(range(len(tensors))))
    _, actual = torch.func.jvp(gradient, detached(tensors), directions)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.* differentiates the reference only")
@samples(FIRST_WITH_GRADIENT)
def test_vmap(name, sample):
    """Of the op, with gradients through it, and of its gradient."""
    function, tensors = of_leaves(name, sample, sample.tensors(torch.float64))
    several = [torch.stack([x, 2 * x]).detach().requires_grad_() for x in tensors]

    def loss(*tensors):
        return sum(out.square().sum() for out in function(*tensors))

    expected = torch.stack([loss(*(x[i] for x in several)) for i in range(2)])
    actual = torch.func.vmap(loss)(*several)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(expected.sum(), several)
    of_gradient = torch.func.vmap(torch.func.grad(loss, tuple(range(len(tensors)))))(*detached(several))
    for found in (torch.autograd.grad(actual.sum(), several), of_gradient):
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b)


@every_lane
@samples(FIRST_WITH_GRADIENT)
def test_asked_for_by_name_refuses_what_it_cannot_differentiate(lane, name, sample):
    if lane.backend == "reference":
        pytest.skip("the reference refuses nothing")
    with lane.active():
        function, tensors = of_leaves(name, sample, sample.tensors(torch.float32, lane.device))
        with pytest.raises(segops.BackendError, match=rf"segops\..*{lane.backend}.* forward-mode AD differentiates"):
            torch.func.jvp(function, detached(tensors), detached(tensors))
        with pytest.raises(segops.BackendError, match=rf"segops\..*{lane.backend}.* torch.func differentiates"):
            torch.func.vjp(function, *detached(tensors))


def test_no_tangent_is_lost_below_the_public_functions():
    """In the op itself, and where only the gradient that backward starts from has a tangent."""
    x = torch.randn(1, 2, 3, 4)
    refused = partial(pytest.raises, match=r"segops\.axial_attention.*: no forward-mode derivative here")
    settings = 1, 1.0, "compose", "hw", False
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with refused(NotImplementedError):
            torch.ops.segops.axial_attention(dual, x, x, *settings)
        y = x.clone().requires_grad_()
        with refused(NotImplementedError):
            torch.autograd.grad(segops.axial_attention(y, x, x), y, dual)


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
@samples(FIRST_WITH_GRADIENT)
def test_compiled_transforms(mode, name, sample):
    torch._dynamo.reset()
    function, tensors = of_leaves(name, sample, sample.tensors(torch.float64))
    primals = detached(tensors)

    def transformed(*directions):
        if mode == "jvp":
            return torch.func.jvp(function, primals, directions)[1]
        return torch.func.vjp(function, *primals)[1](tuple(function(*primals)))

    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    directions = drawn_like(tensors, 2)
    for a, b in zip(compiled(*directions), transformed(*directions), strict=True):
        torch.testing.assert_close(a, b)


@samples(TINY)
def test_meta(name, sample):
    """Shapes and dtypes of outputs and gradients, without numbers."""
    tensors = sample.tensors(torch.float32)
    meta = run(name, sample, apply(lambda x: x.to("meta"), tensors))
    for key, value in run(name, sample, tensors).items():
        assert (meta[key].shape, meta[key].dtype, meta[key].device.type) == (value.shape, value.dtype, "meta"), key


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
@samples(FIRST)
def test_opcheck(lane, name, sample):
    tensors = sample.tensors(torch.float64 if lane.name == "cpu-base" else torch.float32, lane.device)

    def fresh(x):
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor):
            return [fresh(y) for y in x]
        return x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x

    with lane.active():
        if lane.backend == "reference":
            pytest.skip("the reference is eager PyTorch, not an op")
        calls = calls_of(name, sample, tensors)
        assert len(calls) == (2 if f"{name}_backward" in _dispatch.OPS else 1)
        for op, args in calls:
            torch.library.opcheck(op, tuple(fresh(x) for x in args))


def resized(sample, dh, dw):
    """The sample with maps that are dh cells higher and dw wider, and label maps that fit them."""
    scale = sample.kwargs.get("scale_factor", 1)

    def grow(key, spec):
        if isinstance(spec, Labels):
            n, h, w = spec.shape
            return replace(spec, shape=(n, h + scale * dh, w + scale * dw))
        if isinstance(spec, Uniform):
            return replace(spec, shape=grow(key, spec.shape))
        return (*spec[:2], spec[2] + dh, spec[3] + dw) if is_map(key, spec) else spec

    return replace(sample, shapes={key: grow(key, spec) for key, spec in sample.shapes.items()})


def gradients_of_sum(outputs, wanted):
    if not wanted:
        return ()
    return torch.autograd.grad([o.sum() for o in moving(outputs)], list(wanted.values()))


@every_lane
@samples(FIRST)
def test_compile_fullgraph_dynamic(lane, name, sample):
    """One graph for every H and W: none is compiled after two sizes."""
    function = partial(FUNCTIONS[name], **sample.kwargs)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    with lane.active():
        torch._dynamo.reset()
        counted = torch.compile(lambda **x: function(**x), fullgraph=True, dynamic=True, backend=count)
        compiled = torch.compile(lambda **x: function(**x), fullgraph=True, dynamic=True, backend="aot_eager")
        for dh, dw in ((4, 4), (3, 6), (7, 3), (12, 2)):
            inputs, wanted = leaves(sample, resized(sample, dh, dw).tensors(torch.float32, lane.device))
            counted(**inputs)
            expected, actual = outputs_of(function(**inputs)), outputs_of(compiled(**inputs))
            grads = [gradients_of_sum(outputs, wanted) for outputs in (actual, expected)]
            for a, b in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
                if lane.backend == "reference":  # taken apart by the compiler
                    torch.testing.assert_close(a, b)
                else:
                    assert torch.equal(a, b)
    assert len(graphs) <= 2, f"{len(graphs)} graphs for four sizes"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@samples(FIRST)
def test_compile_inductor(name, sample, backward):
    torch._dynamo.reset()
    function = partial(FUNCTIONS[name], **sample.kwargs)
    inputs, wanted = leaves(sample, sample.tensors(torch.float32))
    if backward and not wanted:
        pytest.skip(f"{name} has no gradient")
    if not backward:
        inputs = apply(torch.Tensor.detach, inputs)
    compiled = torch.compile(lambda **x: function(**x), fullgraph=True, dynamic=True)
    expected, actual = outputs_of(function(**inputs)), outputs_of(compiled(**inputs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    if backward:
        got, want = (gradients_of_sum(outputs, wanted) for outputs in (actual, expected))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@samples(FIRST)
def test_export(name, sample):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return FUNCTIONS[name](**dict(zip(sample.shapes, tensors, strict=True)), **sample.kwargs)

    auto = torch.export.Dim.AUTO
    tensors = sample.tensors(torch.float32)
    shapes = tuple(
        tree_map_only(
            torch.Tensor,
            lambda x, key=key: {x.dim() - 2: auto, x.dim() - 1: auto} if is_map(key, sample.shapes[key]) else {},
            value,
        )
        for key, value in tensors.items()
    )
    program = torch.export.export(Layer(), tuple(tensors.values()), dynamic_shapes=(shapes,))
    larger = resized(sample, 5, 3).tensors(torch.float32).values()
    for a, b in zip(outputs_of(program.module()(*larger)), outputs_of(Layer()(*larger)), strict=True):
        assert torch.equal(a, b)


@every_lane
@cases([pair for pair in FIRST if floats(pair[1])], [torch.bfloat16, torch.float16])
def test_autocast(lane, dtype, name, sample):
    """The user's autocast dtype reaches the arguments that the op lowers, also from inputs of mixed dtypes; float64
    stays float64. What the op knows by no name of its own was packed into arguments that it lowers."""
    function = partial(FUNCTIONS[name], **sample.kwargs)
    op = _dispatch.OPS[name]
    tensors = sample.tensors(torch.float32, lane.device)
    lowered = {
        key: apply(lambda x: x.to(dtype), x) if key in op.autocast or key not in op.arguments else x
        for key, x in tensors.items()
    }
    mixed = {key: lowered[key] if i else x for i, (key, x) in enumerate(tensors.items())}
    inputs, wanted = leaves(sample, tensors)
    with lane.active():
        expected = outputs_of(function(**lowered))
        with torch.autocast(lane.device, dtype=dtype):
            actual = outputs_of(function(**mixed))
            double = outputs_of(function(**apply(as_float(torch.float64), tensors)))
            outputs = [out.float().sum() for out in moving(outputs_of(function(**inputs)))]
        gradients = torch.autograd.grad(outputs, list(wanted.values())) if wanted else ()
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert all(out.dtype == torch.float64 for out in double if out.is_floating_point())
    assert all(g.dtype == torch.float32 for g in gradients)


@every_lane
@cases(FIRST)
def test_same_bits_on_every_run_and_any_thread_count(lane, dtype, name, sample):
    """But eager PyTorch splits its work by the number of threads; interpreted and emulated lanes have no threads."""
    tensors = sample.tensors(dtype, lane.device)
    threads = torch.get_num_threads()
    with lane.active():
        first = run(name, sample, tensors)
        for count in (threads,) if lane.backend == "reference" or lane.slow else (1, 3, threads):
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
        assert any(pair[0] == name for pair in TINY), f"{name} has no tiny sample"
    assert {name for name, _ in FEW} == {name for name, _ in WITH_GRADIENT}
    assert set(DTYPES) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
