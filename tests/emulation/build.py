"""Builds and loads the CUDA kernels as host C++ against the emulator: the namespace ``torch.ops.segops_emulated``."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulation"
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), Path(__file__).with_name("library.cpp")]
HEADERS = [ROOT / "csrc" / "schemas.h", *sorted((ROOT / "csrc" / "common").glob("*.h"))]
HEADERS += sorted(Path(__file__).parent.glob("*.h"))
FLAGS = [
    "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DSEGOPS_NAMESPACE=segops_emulated", "-DSEGOPS_CUDA_KEY=CPU",
]  # fmt: skip


class Unavailable(RuntimeError):
    """What the build needs and this machine lacks, in one sentence."""


@functools.cache
def load() -> None:
    """Loads the library, built first if its sources have changed.

    Raises:
        Unavailable: there is no g++, or there are no CUDA headers.
        RuntimeError: the kernels do not compile; the message is the compiler's.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("g++ is not on PATH")
    command = [compiler, *FLAGS, *(f"-I{folder}" for folder in _include_folders())]
    torch.ops.load_library(_library(command))


def _include_folders() -> list[Path]:
    # Not through torch.utils.cpp_extension, which guesses a toolkit and warns about it.
    torch_headers = Path(torch.__file__).parent / "include"
    return [ROOT / "csrc", Path(__file__).parent, torch_headers, cuda_include()]


def cuda_include() -> Path:
    """The folder with cuda_runtime_api.h and cuda_fp16.h; they need no GPU and no nvcc."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if shutil.which("nvcc"):
        # Asked, since nvcc on PATH may be a script that stands elsewhere than its toolkit.
        done = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes += re.findall(r"^#\$ TOP=(\S+)", done.stdout + done.stderr, re.MULTILINE)
    homes += sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)
    for home in homes:
        folder = Path(home, "include").resolve()
        if (folder / "cuda_runtime_api.h").exists() and (folder / "cuda_fp16.h").exists():
            return folder
    raise Unavailable(f"no CUDA headers in {', '.join(homes) or 'CUDA_HOME, beside nvcc or in /usr/local'}")


def _library(command: list[str]) -> Path:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((command, version, torch.__version__)).encode())
    for path in SOURCES + HEADERS:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    library = CACHE / f"segops_emulated_{digest.hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    # One process builds, the others wait; the file appears whole.
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for stale in CACHE.glob("*.so"):
                stale.unlink()
            _build(command, library)
    return library


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:

        def compile_one(source: Path) -> str:
            target = str(Path(folder, source.name + ".o"))
            _run([*command, "-x", "c++", "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        whole = str(Path(folder, library.name))
        _run([command[0], "-shared", *objects, "-o", whole, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"])
        os.replace(whole, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
