"""The router as its users see it: explain, record, use_backend, the environment, and refusals with reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import segops
from segops import _dispatch
from segops._dispatch import Backend


@pytest.fixture
def tensors():
    return torch.randn(3, 1, 4, 6, 7, dtype=torch.float32).unbind()


@pytest.fixture
def rows():
    """The op's CPU rows, restored afterwards."""
    op = _dispatch.OPS["local_attention"]
    before = list(op.backends["cpu"])
    yield op.backends["cpu"]
    op.backends["cpu"][:] = before


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_explain_names_every_backend_and_its_reason(tensors):
    explanation = segops.explain(segops.local_attention, *tensors, 3, 2)
    names = [name for name, _ in explanation.rows]
    assert names[0] == "cpu"
    assert names[-1] == "reference"
    assert explanation.chosen in str(explanation)
    assert explanation.op == "local_attention"


def test_explain_runs_nothing_and_raises_what_the_call_would(tensors):
    with segops.record() as log:
        segops.explain(segops.local_attention, *tensors, 3, 2)
    assert log == []
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        segops.explain(segops.local_attention, *tensors, 4)
    with pytest.raises(TypeError, match="expected a segops operator"):
        segops.explain(torch.relu, tensors[0])
    assert segops.local_attention(*tensors, 3).shape == tensors[0].shape  # the failed explain left nothing behind


def test_record_sees_forward_and_backward(tensors):
    query = tensors[0].clone().requires_grad_()
    with segops.use_backend("reference"), segops.record() as log:
        segops.local_attention(query, *tensors[1:], 3).sum().backward()
    assert [(call.op, call.backend) for call in log] == [("local_attention", "reference")]
    with segops.use_backend("cpu"), segops.record() as log:
        segops.local_attention(query, *tensors[1:], 3).sum().backward()
    assert [(call.op, call.backend) for call in log] == [
        ("local_attention", "cpu"),
        ("local_attention_backward", "cpu"),
    ]


def test_asked_for_by_name_it_runs_or_raises(tensors, rows):
    rows[0] = Backend("cpu", rows[0].run, why_not=lambda query, *rest: "the moon is full")
    with segops.use_backend("cpu"), pytest.raises(segops.BackendError, match=r"'cpu'.*the moon is full"):
        segops.local_attention(*tensors, 3)
    with segops.use_backend("cuda"), pytest.raises(segops.BackendError, match=r"no such backend for device cpu.*cpu"):
        segops.local_attention(*tensors, 3)
    with pytest.raises(ValueError, match=r"expected one of .*reference.* got 'gpu'"), segops.use_backend("gpu"):
        pass


def test_automatic_choice_falls_back_with_one_warning(tensors, rows):
    rows[0] = Backend("cpu", rows[0].run, why_not=lambda query, *rest: "the moon is half full")
    with pytest.warns(UserWarning, match=r"runs on 'reference': backend 'cpu' refused, the moon is half full"):
        out = segops.local_attention(*tensors, 3)
    assert out.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segops.local_attention(*tensors, 3)


def test_no_warning_for_a_backend_that_cannot_exist_here(tensors, rows):
    rows[0] = Backend("cpu", rows[0].run, available=lambda: "not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segops.local_attention(*tensors, 3)


def test_a_row_that_an_op_does_without_says_why():
    row = _dispatch.OPS["dupsample_argmax"].backends["cuda"][-1]
    assert (row.name, row.run) == ("cuda", None)
    assert "no CUDA C++" in row.available()
    with segops.use_backend("cuda"), pytest.raises(segops.BackendError, match="no such backend for device cpu"):
        segops.dupsample_argmax(torch.zeros(1, 2, 3, 3), torch.zeros(8, 2), scale_factor=2)


def test_a_module_built_before_the_op_was_written_says_so():
    compiled = _dispatch.Compiled("not_yet_written", lambda namespace: None)
    row = _dispatch.compiled_row("cpu", compiled, "segops_C", None, lambda *args: None)
    assert row.available() == "segops_C has no not_yet_written: build again"


def test_explain_takes_lists_and_optional_tensors():
    explanation = segops.explain(segops.upsample_argmax, [torch.zeros(1, 3, 2, 2)] * 2, 8)
    assert explanation.op == "upsample_argmax"
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    explanation = segops.explain(segops.upsample_cross_entropy, torch.zeros(1, 3, 2, 2), target, ohem_threshold=0.7)
    assert explanation.op == "upsample_cross_entropy"


def test_reference_fallback_is_differentiable_twice(rows):
    rows[0] = Backend("cpu", rows[0].run, available=lambda: "not built")
    inputs = [x.double().requires_grad_() for x in torch.randn(3, 1, 2, 3, 4).unbind()]
    torch.autograd.gradgradcheck(lambda *x: segops.local_attention(*x, 3, 2), inputs)


def test_the_op_itself_falls_back_to_the_reference_with_gradients(rows):
    rows[0] = Backend("cpu", rows[0].run, available=lambda: "not built")
    backward = _dispatch.OPS["local_attention_backward"].backends["cpu"]
    kept = backward[0]
    backward[0] = rows[0]
    try:
        inputs = [x.double().requires_grad_() for x in torch.randn(3, 1, 2, 3, 4).unbind()]
        op = torch.ops.segops.local_attention
        torch.autograd.gradcheck(lambda *x: op(*x, [3, 3], [2, 1], 1, 0.5, "zero"), inputs)
        torch.autograd.gradgradcheck(lambda *x: op(*x, [3, 3], [2, 1], 1, 0.5, "zero"), inputs)
    finally:
        backward[0] = kept


def test_switching_backend_recompiles_rather_than_misleads(tensors):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: segops.local_attention(*x, 3), fullgraph=True, backend="aot_eager")
    for backend in ("cpu", "reference", "cpu"):
        with segops.use_backend(backend), segops.record() as log:
            compiled(*tensors)
        assert {call.backend for call in log} <= {backend}
        assert bool(log) == (backend == "cpu")  # the reference is traced into the graph


def test_environment_chooses_and_refuses_unknown_names():
    chosen = run_python(
        "import torch, segops\nwith segops.record() as log:\n segops.local_attention(*torch.randn(3,1,2,3,4), 3)\n"
        "print(log[0].backend)",
        SEGOPS_BACKEND="reference",
    )
    assert chosen.stdout.strip() == "reference", chosen.stderr
    wrong = run_python("import segops", SEGOPS_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "SEGOPS_BACKEND: expected one of" in wrong.stderr
    capped = run_python("from segops import _native; print(_native.cpu_isa())", SEGOPS_CPU_ISA="base")
    assert capped.stdout.strip() == "base", capped.stderr
    wrong = run_python("import segops", SEGOPS_CPU_ISA="sse9")
    assert "expected one of base, avx2, avx512" in wrong.stderr


def test_import_brings_in_neither_triton_nor_cuda():
    code = "import sys, torch\nbefore = set(sys.modules)\nimport segops\nnew = set(sys.modules) - before\n"
    code += "print([m for m in new if m.split('.')[0] == 'triton' or m.startswith('segops.kernels')])\n"
    code += "print(torch.cuda.is_initialized())"
    result = run_python(code)
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stdout + result.stderr


def test_info_lists_every_op_and_backend():
    result = subprocess.run([sys.executable, "-m", "segops", "info"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for word in ("local_attention_backward", "triton-interpret", "reference", "segops._C_cuda"):
        assert word in result.stdout
