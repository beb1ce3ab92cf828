"""The tree is a map: one op, one name, in every layer; and imports run in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from segops import _dispatch

ROOT = Path(__file__).parent.parent
OPS = sorted(name for name in _dispatch.OPS if not name.endswith("_backward"))
LAYERS = (
    "segops/ops/{}.py", "segops/reference/{}.py", "kernels/{}.py", "csrc/cpu/{}.cpp", "csrc/cuda/{}.cu",
    "tests/ops/test_{}.py", "benchmarks/bench_{}.py",
)  # fmt: skip
# Layers that an op does without, each with its reason.
ABSENT: dict[tuple[str, str], str] = {
    ("axial_attention", "csrc/cuda/{}.cu"): "matrix products want tensor cores, which are Triton's",
    ("dupsample_cross_entropy", "csrc/cuda/{}.cu"): "matrix products want tensor cores, which are Triton's",
    ("dupsample_argmax", "csrc/cuda/{}.cu"): "a matrix product wants tensor cores, which are Triton's",
    ("upsample_cross_entropy", "csrc/cuda/{}.cu"): "no halo and no gather: nothing that Triton does badly",
    ("upsample_argmax", "csrc/cuda/{}.cu"): "no halo and no gather: nothing that Triton does badly",
    ("nmf2d", "csrc/cuda/{}.cu"): "matrix products want tensor cores, which are Triton's",
    ("car_losses", "csrc/cuda/{}.cu"): "matrix products want tensor cores, which are Triton's",
    ("msca", "csrc/cpu/{}.cpp"): "multi_scale_strip_conv's kernels and torch's matrix product",
    ("msca", "csrc/cuda/{}.cu"): "multi_scale_strip_conv's kernels and torch's matrix product",
    ("confusion_matrix", "csrc/cuda/{}.cu"): "bound by the bytes of the labels",
}

# Who may import whom, inside the project. What a package does not name here it may not import.
ALLOWED = {
    "segops/nn": {"segops.ops", "segops.nn", "segops._checks", "segops"},
    "segops/compat.py": {"segops.ops", "segops._checks"},
    "segops/_fuse.py": {"segops.ops", "segops.nn", "segops.testing"},
    "segops/ops": {"segops.ops", "segops._dispatch", "segops._checks", "segops._context", "segops.reference"},
    "segops/reference": {"segops.reference", "segops._context"},
    "kernels": {"kernels", "segops.kernels"},
    "segops/_dispatch.py": {"segops._native", "segops._context", "segops.kernels"},
    "segops/_native.py": set(),
    "segops/_checks.py": {"segops._context"},
    "segops/_context.py": set(),
    "segops/testing.py": set(),
    "segops/metrics.py": {"segops.ops"},
    "segops/dupsampling.py": {"segops.ops", "segops.metrics", "segops._native", "segops._checks"},
}
THIRD_PARTY = {
    "segops/reference": {"torch"},
    "segops/ops": {"torch"},
    "segops/nn": {"torch"},
    "kernels": {"torch", "triton"},
    "segops": {"torch", "numpy"},
}


def files(place):
    path = ROOT / place
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imports(path):
    """Absolute names of the modules that a file imports."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name, allowed):
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_file_in_every_layer(op, layer):
    exists, reason = (ROOT / layer.format(op)).exists(), ABSENT.get((op, layer))
    assert exists or reason, f"{op} has no {layer.format(op)}: add it, or its reason to ABSENT"
    assert not (exists and reason), f"{layer.format(op)} exists: take its line out of ABSENT"


@pytest.mark.parametrize("layer", LAYERS[:5])
def test_no_layer_holds_an_op_that_the_table_lacks(layer):
    folder, suffix = Path(layer).parent, Path(layer).suffix
    shared = {"isa"}  # csrc/cpu: the instruction set in force
    names = {path.stem for path in (ROOT / folder).glob(f"*{suffix}") if not path.stem.startswith("_")}
    assert names - shared <= set(OPS), names - shared - set(OPS)


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_run_in_one_direction(place):
    for path in files(place):
        for name in imports(path):
            if name.split(".")[0] in ("segops", "kernels", "csrc", "tests", "benchmarks", "examples"):
                allowed = ALLOWED[place] - {"segops"}
                public = "segops" in ALLOWED[place] and name.count(".") == 1 and not name.startswith("segops._")
                assert within(name, allowed) or public, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("place", THIRD_PARTY)
def test_third_party_imports(place):
    import sys

    own = {"segops", "kernels"}
    for path in files(place):
        for name in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in own or top == "":
                continue
            assert top in THIRD_PARTY[place], f"{path.relative_to(ROOT)} imports {top}"


def test_only_dispatch_talks_to_torch_library():
    for path in files("segops"):
        if path.name != "_dispatch.py":
            assert "torch.library" not in path.read_text(), path


def test_ops_package_imports_modules_and_re_exports_no_function():
    import importlib
    import types

    for op in OPS:
        module = importlib.import_module(f"segops.ops.{op}")
        assert isinstance(module, types.ModuleType)
        assert getattr(importlib.import_module("segops.ops"), op) is module


def test_setup_knows_no_op_by_name():
    text = (ROOT / "setup.py").read_text()
    assert not [op for op in OPS if op in text]


def test_csrc_uses_the_stable_abi_only():
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            for line in path.read_text().splitlines():
                if line.startswith("#include") and any(word in line for word in ("torch/", "ATen/", "c10/")):
                    assert any(f"<{prefix}" in line for prefix in allowed), f"{path.relative_to(ROOT)}: {line}"
