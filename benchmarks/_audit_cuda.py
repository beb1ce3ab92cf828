"""The CUDA kernels as nvcc compiles them, read back, with the launches that the host code makes for named shapes."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "nvcc"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90")
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # setup.py's

# The kernels that an op's forward and backward launch, in order, and the template arguments that name their instances.
PASSES = {"forward": ("forward",), "backward": ("query", "key")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
STORED = {"bf16": "Bits16", "fp16": "Bits16", "fp32": "f", "fp64": "d"}
_INSTANCE = re.compile(
    r"\d([a-z]+)_kernelINS\d*_5ShapeI(?:NS\d*_6(Bits16)E|(f)|(d))(?:Li\d+E){3}Lb([01])ELb([01])"
)  # kernel, element type, Exact, Alone


def nvcc_missing() -> str | None:
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


@functools.cache
def nvcc_object(source: Path, arch: str) -> Path:
    """The object of one .cu file; compiled when its sources, the flags, torch or nvcc have changed.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    folders = [ROOT / "csrc", Path(torch.__file__).parent / "include"]
    code = f"arch=compute_{arch.removeprefix('sm_')},code={arch}"
    command = ["nvcc", *FLAGS, "-gencode", code, *(f"-I{folder}" for folder in folders), "-c", str(source)]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((command, version, torch.__version__)).encode())
    for path in (source, ROOT / "csrc" / "schemas.h", *sorted((ROOT / "csrc" / "common").glob("*.h"))):
        digest.update(path.read_bytes())
    target = CACHE / f"{source.stem}.{arch}.{digest.hexdigest()[:16]}.o"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{source.stem}.{arch}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            whole = Path(folder, target.name)
            done = subprocess.run([*command, "-o", str(whole)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            for stale in CACHE.glob(f"{source.stem}.{arch}.*.o"):
                stale.unlink()
            os.replace(whole, target)
    return target


def cuda_rows() -> list[dict[str, Any]]:
    """One row per direction, dtype, layout, window and architecture, for LDv2 on 2 x 256 x 128 x 128."""
    rows = []
    for name, instance, launch in _cases():
        for arch in ARCHS:
            usage, instructions = _facts(arch)[instance]
            row = {"kernel": name, "arch": arch, "registers": usage["registers"], "spill_bytes": usage["stack"]}
            row |= launch | instructions
            row["occupancy"] = _sass().occupancy(arch, usage["registers"], launch["shared"], launch["threads"])
            rows.append(row)
    return rows


def _sass() -> Any:
    import _sass

    return _sass


@functools.cache
def _facts(arch: str) -> dict[tuple[str, str, bool, bool], tuple[dict[str, int], dict[str, Any]]]:
    """By kernel, element type, and whether the window and the single column phase are compiled in."""
    sass, facts = _sass(), {}
    path = nvcc_object(ROOT / "csrc" / "cuda" / "local_attention.cu", arch)
    instructions = sass.sass(path)
    for name, usage in sass.resource_usage(path).items():
        kernel, *stored, exact, alone = _INSTANCE.search(name).groups()
        mix = {
            "load_widths": sass.load_widths(instructions[name]),
            "hot_loop": sass.hot_loop_mix(_products(instructions[name])),
            "tensor_core": sass.tensor_core(instructions[name]),
        }
        facts[kernel, next(filter(None, stored)), exact == "1", alone == "1"] = usage, mix
    return facts


def _products(instrs: list[Any]) -> list[Any]:
    """The loop that most multiply-adds are in; the kernels' longest loop may be one that loads or converts."""
    loops = []
    for last, instr in enumerate(instrs):
        target = re.search(r"(0x[0-9a-f]+)\s*$", instr.operands)
        if instr.mnemonic == "BRA" and target and int(target[1], 16) < instr.address:
            loops.append([i for i in instrs[: last + 1] if i.address >= int(target[1], 16)])
    inner = [a for a in loops if not any(b is not a and a[0] <= b[0] and b[-1] <= a[-1] for b in loops)]
    return max(inner, key=lambda loop: sum(i.mnemonic in ("FFMA", "DFMA") for i in loop))


def _cases():
    """Name, instance of the kernel (see ``_facts``) and launch, which is the host code's, emulated and run dry."""
    sys.path.insert(0, str(ROOT))
    from tests.emulation import build

    build.load()
    ops = torch.ops.segops_emulated
    for dtype, torch_dtype in DTYPES.items():
        for layout, memory_format in LAYOUTS.items():
            q, k, v, out, g, gq, gk, gv = (
                torch.empty(2, 256, 128, 128, dtype=torch_dtype, memory_format=memory_format) for _ in range(8)
            )
            lse = torch.empty(2, 8, 128, 128, dtype=torch.float64 if dtype == "fp64" else torch.float32)
            for size in (5, 7):
                window = [size, size], [6, 6], 8, 1.0, 0
                exact = size == 5 and dtype != "fp64"
                for direction, kernels in PASSES.items():
                    ops.dry_run(True)
                    if direction == "forward":
                        ops.local_attention(out, lse, q, k, v, *window)
                    else:
                        ops.local_attention_backward(gq, gk, gv, g, None, q, k, v, out, lse, *window)
                    launches = [[ops.launched(i, what) for what in range(3)] for i in range(len(kernels))]
                    ops.dry_run(False)
                    for kernel, (blocks, threads, shared) in zip(kernels, launches, strict=True):
                        full = direction if len(kernels) == 1 else f"{direction}_{kernel}"
                        yield (
                            f"local_attention/cuda/{full}/{dtype}/{layout}/d32/k{size}",
                            (kernel, STORED[dtype], exact, exact and layout == "channels_last"),
                            {"blocks": blocks, "threads": threads, "shared": shared},
                        )
