"""The CUDA kernels as nvcc compiles them, read back, with the launches that the host code makes for named shapes."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "nvcc"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90")
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # setup.py's

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
STORED = {"bf16": "Bits16", "fp16": "Bits16", "fp32": "f", "fp64": "d"}


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
    """One row per kernel launch of every named call, and architecture."""
    rows = []
    for source in SOURCES:
        audited = AUDITED[source.stem]
        for name, instance, launch in audited.cases():
            for arch in ARCHS:
                usage, instructions = _facts(source, arch)[instance]
                row = {"kernel": name, "arch": arch, "registers": usage["registers"], "spill_bytes": usage["stack"]}
                row |= launch | instructions
                row["occupancy"] = _sass().occupancy(arch, usage["registers"], launch["shared"], launch["threads"])
                rows.append(row)
    return rows


def _sass() -> Any:
    import _sass

    return _sass


Instance = tuple[Any, ...]  # what tells the instances of one file's kernels from each other


@dataclass(frozen=True)
class Audited:
    """One .cu file.

    Attributes:
        instance: Mangled name of a kernel -> its instance.
        cases: Name, instance and launch of every kernel that some named calls run.
        hot_loop: Instructions of a kernel -> those of its hottest loop.
    """

    instance: Callable[[str], Instance]
    cases: Callable[[], Iterator[tuple[str, Instance, dict[str, int]]]]
    hot_loop: Callable[[list[Any]], Any]


@functools.cache
def _facts(source: Path, arch: str) -> dict[Instance, tuple[dict[str, int], dict[str, Any]]]:
    sass, audited, facts = _sass(), AUDITED[source.stem], {}
    path = nvcc_object(source, arch)
    instructions = sass.sass(path)
    for name, usage in sass.resource_usage(path).items():
        mix = {
            "load_widths": sass.load_widths(instructions[name]),
            "hot_loop": sass.hot_loop_mix(audited.hot_loop(instructions[name])),
            "tensor_core": sass.tensor_core(instructions[name]),
        }
        facts[audited.instance(name)] = usage, mix
    return facts


def _launches(call: Callable[[Any], None], count: int) -> list[dict[str, int]]:
    """The launches that the host code makes for a call of ``count`` kernels, emulated and run dry."""
    sys.path.insert(0, str(ROOT))
    from tests.emulation import build

    build.load()
    ops = torch.ops.segops_emulated
    ops.dry_run(True)
    call(ops)
    launches = [
        {field: ops.launched(i, what) for what, field in enumerate(("blocks", "threads", "shared"))}
        for i in range(count)
    ]
    ops.dry_run(False)
    return launches


# local_attention: LDv2 on 2 x 256 x 128 x 128; kernel, element type, and whether the window and the single column phase
# are compiled in.

_ATTENTION = re.compile(r"\d([a-z]+)_kernelINS\d*_5ShapeI(?:NS\d*_6(Bits16)E|(f)|(d))(?:Li\d+E){3}Lb([01])ELb([01])")
_ATTENTION_PASSES = {"forward": ("forward",), "backward": ("query", "key")}


def _attention_instance(name: str) -> Instance:
    kernel, *stored, exact, alone = _ATTENTION.search(name).groups()
    return kernel, next(filter(None, stored)), exact == "1", alone == "1"


def _attention_cases() -> Iterator[tuple[str, Instance, dict[str, int]]]:
    for (dtype, torch_dtype), (layout, memory_format) in itertools.product(DTYPES.items(), LAYOUTS.items()):
        q, k, v, out, g, gq, gk, gv = (
            torch.empty(2, 256, 128, 128, dtype=torch_dtype, memory_format=memory_format) for _ in range(8)
        )
        lse = torch.empty(2, 8, 128, 128, dtype=torch.float64 if dtype == "fp64" else torch.float32)
        for size, (direction, kernels) in itertools.product((5, 7), _ATTENTION_PASSES.items()):
            window = [size, size], [6, 6], 8, 1.0, 0
            exact = size == 5 and dtype != "fp64"
            tensors = (out, lse, q, k, v) if direction == "forward" else (gq, gk, gv, g, None, q, k, v, out, lse)
            op = "local_attention" if direction == "forward" else "local_attention_backward"
            launches = _launches(lambda ops, op=op, args=(*tensors, *window): getattr(ops, op)(*args), len(kernels))
            for kernel, launch in zip(kernels, launches, strict=True):
                full = direction if len(kernels) == 1 else f"{direction}_{kernel}"
                instance = kernel, STORED[dtype], exact, exact and layout == "channels_last"
                yield f"local_attention/cuda/{full}/{dtype}/{layout}/d32/k{size}", instance, launch


def _products(instrs: list[Any]) -> list[Any]:
    """The loop that most multiply-adds are in; the kernels' longest loop may be one that loads or converts."""
    loops = []
    for last, instr in enumerate(instrs):
        target = re.search(r"(0x[0-9a-f]+)\s*$", instr.operands)
        if instr.mnemonic == "BRA" and target and int(target[1], 16) < instr.address:
            loops.append([i for i in instrs[: last + 1] if i.address >= int(target[1], 16)])
    inner = [a for a in loops if not any(b is not a and a[0] <= b[0] and b[-1] <= a[-1] for b in loops)]
    return max(inner, key=lambda loop: sum(i.mnemonic in ("FFMA", "DFMA") for i in loop))


# dupsample: what torch's products leave to do, for 8 x 33 x 33 cells and 21 classes, r = 16; kernel and element type.

_REARRANGE = re.compile(r"\d(rearrange(?:_backward)?)_kernelI(?:NS\d*_6(Bits16)E|(f)|(d))E")


def _rearrange_instance(name: str) -> Instance:
    kernel, *stored = _REARRANGE.search(name).groups()
    return kernel, next(filter(None, stored))


def _rearrange_cases() -> Iterator[tuple[str, Instance, dict[str, int]]]:
    for (dtype, torch_dtype), (layout, memory_format) in itertools.product(DTYPES.items(), LAYOUTS.items()):
        pixels = torch.empty(8, 21, 528, 528, dtype=torch_dtype).to(memory_format=memory_format)
        columns = torch.empty(8, 256 * 21, 33 * 33, dtype=torch_dtype)
        calls = {
            "rearrange": lambda ops, a=pixels, b=columns: ops.dupsample_rearrange(a, b, None, None, 16),
            "rearrange_backward": lambda ops, a=pixels, b=columns: ops.dupsample_rearrange_backward(b, a, None, 16),
        }
        for kernel, call in calls.items():
            [launch] = _launches(call, 1)
            yield f"dupsample/cuda/{kernel}/{dtype}/{layout}/k21", (kernel, STORED[dtype]), launch


# multi_scale_strip_conv: SegNeXt's windows on 8 x 64 x 128 x 128; kernel and element type.

_STRIPS = re.compile(r"\d(forward|backward|sum)_kernelI(?:NS\d*_6(Bits16)E|(f)|(d))E")


def _strips_instance(name: str) -> Instance:
    kernel, *stored = _STRIPS.search(name).groups()
    return kernel, next(filter(None, stored))


def _strips_cases() -> Iterator[tuple[str, Instance, dict[str, int]]]:
    lengths = [7, 11, 21]
    for (dtype, torch_dtype), (layout, memory_format) in itertools.product(DTYPES.items(), LAYOUTS.items()):
        x, out, grad = (torch.empty(8, 64, 128, 128, dtype=torch_dtype, memory_format=memory_format) for _ in range(3))
        taps = torch.empty(64, 25 + 2 * sum(lengths), dtype=torch_dtype)
        biases = torch.empty(64, 1 + 2 * len(lengths), dtype=torch_dtype)
        forward = (out, x, taps, biases, [5, 5], lengths)
        backward = (out, taps, biases, grad, x, taps, biases, None, None, [5, 5], lengths)
        [launch] = _launches(lambda ops, args=forward: ops.multi_scale_strip_conv(*args), 1)
        yield f"multi_scale_strip_conv/cuda/forward/{dtype}/{layout}", ("forward", STORED[dtype]), launch
        launches = _launches(lambda ops, args=backward: ops.multi_scale_strip_conv_backward(*args), 2)
        for kernel, full, launch in zip(("backward", "sum"), ("backward", "backward_sum"), launches, strict=True):
            yield f"multi_scale_strip_conv/cuda/{full}/{dtype}/{layout}", (kernel, STORED[dtype]), launch


# class_centers: sums of 8 x 512 x 64 x 64 by 150 classes; kernel and element type.

_CLASSES = re.compile(r"\d(partial|sum|backward)_kernelI(?:NS\d*_6(Bits16)E|(f)|(d))E")


def _classes_instance(name: str) -> Instance:
    kernel, *stored = _CLASSES.search(name).groups()
    return kernel, next(filter(None, stored))


def _classes_cases() -> Iterator[tuple[str, Instance, dict[str, int]]]:
    for (dtype, torch_dtype), (layout, memory_format) in itertools.product(DTYPES.items(), LAYOUTS.items()):
        x = torch.empty(8, 512, 64, 64, dtype=torch_dtype, memory_format=memory_format)
        labels = torch.empty(8, 64, 64, dtype=torch.uint8)
        sums = torch.empty(150, 512, dtype=torch.float64 if dtype == "fp64" else torch.float32)
        counts = torch.empty(150, dtype=torch.int64)
        forward, backward = (sums, counts, x, labels, 255), (x, sums, labels, 255)
        launches = _launches(lambda ops, args=forward: ops.class_centers(*args), 2)
        launches += _launches(lambda ops, args=backward: ops.class_centers_backward(*args), 1)
        for kernel, full, launch in zip(
            ("partial", "sum", "backward"), ("forward", "forward_sum", "backward"), launches, strict=True
        ):
            yield f"class_centers/cuda/{full}/{dtype}/{layout}/k150", (kernel, STORED[dtype]), launch


AUDITED = {
    "class_centers": Audited(_classes_instance, _classes_cases, lambda instrs: _sass().hot_loop(instrs)),
    "dupsample": Audited(_rearrange_instance, _rearrange_cases, lambda instrs: _sass().hot_loop(instrs)),
    "local_attention": Audited(_attention_instance, _attention_cases, _products),
    "multi_scale_strip_conv": Audited(_strips_instance, _strips_cases, _products),
}
