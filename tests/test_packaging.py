"""What a user's machine gets: sources in the sdist, every package in the build, a pure-Python install that works."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return listed.stdout.split()


def test_every_package_is_listed():
    found = {".".join(Path(path).parent.parts) for path in tracked("segops/*__init__.py", "segops/**/__init__.py")}
    assert found | {"segops.kernels"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_versions_agree():
    import segops

    assert PROJECT["project"]["version"] == segops.__version__


def setup(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_build_decisions_are_printed_and_wrong_switches_refused(tmp_path):
    said = setup("--name", SEGOPS_CUDA="0").stdout
    assert "_C_cuda not built: SEGOPS_CUDA=0" in said
    assert "nothing is compiled (SEGOPS_NATIVE=0)" in setup("--name", SEGOPS_NATIVE="0").stdout
    for wrong in ({"SEGOPS_CUDA": "yes"}, {"SEGOPS_NATIVE": "2"}):
        refused = setup("--name", **wrong)
        assert refused.returncode != 0
        assert next(iter(wrong)) in refused.stderr
    import torch

    if torch.version.cuda is None:
        assert f"torch {torch.__version__} has no CUDA" in setup("--name").stdout
        assert "SEGOPS_CUDA=1, but" in setup("--name", SEGOPS_CUDA="1").stderr


def test_pure_python_install_runs_the_reference(tmp_path):
    """SEGOPS_NATIVE=0: the package without compiled modules."""
    built = setup("build_py", "--build-lib", str(tmp_path / "lib"), SEGOPS_NATIVE="0")
    assert built.returncode == 0, built.stderr
    code = (
        "import torch, segops\n"
        "x = [t.requires_grad_() for t in torch.randn(3, 1, 4, 5, 6).unbind()]\n"
        "print(segops.explain(segops.local_attention, *x, 3).chosen)\n"
        "segops.local_attention(*x, 3).sum().backward()\n"
        "print(segops.__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    chosen, where = ran.stdout.split()
    assert chosen == "reference"
    assert Path(where).is_relative_to(tmp_path)
    assert (tmp_path / "lib" / "segops" / "kernels" / "local_attention.py").exists()


def test_shipped_cpu_module_carries_no_foreign_instructions():
    """The linker could keep a weak symbol with wide instructions for every machine: our bodies are local."""
    import shutil

    libraries = list((ROOT / "segops").glob("_C.*.so"))
    if not libraries or shutil.which("nm") is None:
        pytest.skip("no built segops._C in the checkout, or no nm")
    symbols = subprocess.run(["nm", "-C", str(libraries[0])], capture_output=True, text=True).stdout
    wide = [s for s in symbols.splitlines() if "segops::avx" in s]
    assert wide, "no instruction-set namespaces found"
    assert not [s for s in wide if " W " in s or " V " in s]
