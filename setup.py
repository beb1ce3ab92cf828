"""What gets compiled, and why not. Globs csrc/ and knows no op by name."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import setup

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: one binary serves it and everything newer
# Without -O3 and the -fno- flags, exp and the half conversions do not vectorise (up to 10x slower).
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CPU_FLAGS += ["-std=c++20", "-fvisibility=hidden", "-Wall", STABLE_ABI]
CUDA_ARCHS = "8.0;9.0+PTX"

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"segops needs setuptools >= 77, found {setuptools.__version__}: pip install -U 'setuptools>=77'")


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def headers() -> list[str]:
    return sorted(str(path) for path in (ROOT / "csrc").rglob("*.h"))


def cuda_home() -> tuple[str | None, str]:
    """The toolkit, and how it was found. Where nvcc on PATH is a wrapper script, the compiler it names is followed."""
    candidates: list[tuple[str, str]] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append((os.environ[variable], f"from {variable}"))
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append((str(Path(nvcc).resolve().parent.parent), f"beside {nvcc}"))
        head = Path(nvcc).read_bytes()[:4096]
        if head.startswith(b"#!"):
            for named in re.findall(r"(/[^\s\"']+)/bin/nvcc", head.decode(errors="replace")):
                candidates.insert(0, (named, f"named by the wrapper script {nvcc}"))
    candidates += [(str(path), "usual place") for path in sorted(Path("/usr/local").glob("cuda*"), reverse=True)]
    for home, how in candidates:
        if (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return home, how
    return None, "no complete CUDA toolkit (nvcc and headers) found"


def cuda_decision() -> tuple[str | None, str]:
    """CUDA_HOME to build with or None, and the reason. Never asks for a GPU: build machines have none."""
    import torch

    wanted = os.environ.get("SEGOPS_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"SEGOPS_CUDA must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0":
        return None, "SEGOPS_CUDA=0"
    reasons = []
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} has no CUDA")
    home, how = cuda_home()
    if home is None:
        reasons.append(how)
    if not sources("cuda", ".cu"):
        reasons.append("no sources in csrc/cuda")
    if reasons and wanted == "1":
        sys.exit(f"SEGOPS_CUDA=1, but: {'; '.join(reasons)}")
    return (None, "; ".join(reasons)) if reasons else (home, f"toolkit {home} ({how})")


def extensions() -> list[setuptools.Extension]:
    native = os.environ.get("SEGOPS_NATIVE", "1")
    if native not in ("0", "1"):
        sys.exit(f"SEGOPS_NATIVE must be 1 or 0, got {native!r}")
    if native == "0":
        print("segops: nothing is compiled (SEGOPS_NATIVE=0): Triton on GPU, the reference elsewhere")
        return []
    home, reason = cuda_decision()
    if home is not None:
        os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension guesses one
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    from torch.utils import cpp_extension

    print(f"segops: _C for {platform.machine()}; _C_cuda {'with' if home else 'not built:'} {reason}")
    built = [cpp_extension.CppExtension(
        "segops._C", sources("cpu", ".cpp"), include_dirs=[str(ROOT / "csrc")], depends=headers(),
        extra_compile_args={"cxx": CPU_FLAGS},
    )]  # fmt: skip
    if home is not None:
        built.append(cpp_extension.CUDAExtension(
            "segops._C_cuda", sources("cuda", ".cu"), include_dirs=[str(ROOT / "csrc")], depends=headers(),
            extra_compile_args={"cxx": CPU_FLAGS, "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", STABLE_ABI]},
        ))  # fmt: skip
    if sources("labels", ".cpp"):
        from pybind11.setup_helpers import Pybind11Extension

        built.append(Pybind11Extension(
            "segops._labels", sources("labels", ".cpp"), cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-pthread"], extra_link_args=["-pthread"],
        ))  # fmt: skip
    return built


ext_modules = extensions()
cmdclass = {}
if ext_modules:
    from torch.utils.cpp_extension import BuildExtension

    cmdclass["build_ext"] = BuildExtension

setup(ext_modules=ext_modules, cmdclass=cmdclass)
