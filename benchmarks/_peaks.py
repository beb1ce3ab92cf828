"""What the machine can do at most on the threads that the benchmark uses, and the floor that follows from it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

_FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-shared", "-fPIC", "-pthread"]
_ELEMENTS = 64 << 20  # 256 MB per array


@dataclass(frozen=True)
class Work:
    """What an operator cannot avoid: every input read once and every output written once, its flops and its exps."""

    bytes: float
    flops: float
    exps: float


@dataclass(frozen=True)
class Peaks:
    """Bytes, flops and exponentials per second.

    Attributes:
        overlap: Arithmetic and exponentials run on units of their own (GPU), not on the same ports (CPU).
    """

    bytes: float
    flops: float
    exps: float
    overlap: bool
    source: str

    def floor(self, work: Work) -> float:
        """Seconds that no implementation of the work can go below; memory always overlaps with arithmetic."""
        flops, exps = work.flops / self.flops, work.exps / self.exps
        return max(work.bytes / self.bytes, max(flops, exps) if self.overlap else flops + exps)

    def as_dict(self) -> dict:
        return asdict(self)


# Two AVX-512 cores of a Granite-Rapids-class server on a quiet host: a fixed yardstick beside the peaks of the run.
REFERENCE = Peaks(28.8e9, 387e9, 8.75e9, False, "two AVX-512 cores, quiet: 28.8 GB/s, 387 GF/s, 8.75 Gexp/s")


def measure(device: str, before: Peaks | None = None) -> Peaks:
    """The best of this measurement and ``before``: a neighbour can only make a peak look lower.

    Raises:
        RuntimeError: there is no C++ compiler to build the CPU loops with.
    """
    now = _cpu() if device == "cpu" else _cuda()
    if before is None:
        return now
    best = {unit: max(getattr(now, unit), getattr(before, unit)) for unit in ("bytes", "flops", "exps")}
    return Peaks(**best, overlap=now.overlap, source=now.source)


def _cpu() -> Peaks:
    library, threads = _library(), torch.get_num_threads()

    def best(function, size, rounds):
        return max(function(size, threads) for _ in range(rounds))

    return Peaks(
        best(library.triad, _ELEMENTS, 3),
        best(library.multiply_add, 1 << 23, 5),
        best(library.exponential, 1 << 16, 5),
        overlap=False,
        source=f"triad over 3 x 256 MB, multiply-add and exp loops, {threads} threads",
    )


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    folder = tempfile.mkdtemp(prefix="segops_peaks_")
    binary = Path(folder) / "peaks.so"
    for flags in (_FLAGS, [flag for flag in _FLAGS if not flag.startswith("-mprefer")]):  # that one is x86 only
        try:
            built = subprocess.run(["g++", *flags, str(source), "-o", str(binary)], capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("peaks are not measured: g++ not found") from None
        if built.returncode == 0:
            break
    else:
        raise RuntimeError(f"peaks are not measured: {built.stderr.strip().splitlines()[0]}")
    library = ctypes.CDLL(str(binary))
    for name in ("triad", "multiply_add", "exponential"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_double, (ctypes.c_long, ctypes.c_int)
    return library


def _cuda() -> Peaks:
    """Copy is measured. Arithmetic is units x clock (CUDA guide, throughput of native arithmetic instructions)."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    major, minor = torch.cuda.get_device_capability()
    lanes = 64 if (major, minor) == (8, 0) else 128
    units = torch.cuda.get_device_properties("cuda").multi_processor_count
    clock = _cuda_clock()
    return Peaks(
        2 * source.nbytes / min(seconds),
        units * lanes * 2 * clock,
        units * 16 * clock,
        overlap=True,
        source=f"copy of 1 GB measured; {units} SMs x {lanes} FMA and 16 exp per clock at {clock / 1e9:.2f} GHz",
    )


def _cuda_clock() -> float:
    """The highest clock in Hz: from the device properties, else from nvidia-smi."""
    kilohertz = getattr(torch.cuda.get_device_properties("cuda"), "clock_rate", None)
    if kilohertz:
        return kilohertz * 1e3
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6
