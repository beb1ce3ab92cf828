"""Options, the runner and what the JSON of pytest-benchmark says about the machine."""

from __future__ import annotations

import ctypes
import platform
from importlib import metadata
from pathlib import Path

import _peaks
import pytest
import torch
from _measure import CLOCK, ROUNDS, Limits, Runner, WrongResult, work_of

import segops
from segops import _native

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
PEAKS, FAILED = pytest.StashKey[_peaks.Peaks | str](), pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("segops benchmarks")
    group.addoption(
        "--allocator", choices=("default", "keep"), default="default", help="what is done with freed memory"
    )
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--rounds", type=int, default=ROUNDS, help="rounds of segops; rivals get at most as many")
    group.addoption("--budget", type=float, default=3.0, help="seconds of timing per rival and row")
    group.addoption("--memory-bound", type=float, default=6.0, help="gigabytes that a rival may take")
    group.addoption("--call-bound", type=float, default=15.0, help="seconds that one call may take in the memory run")


def pytest_configure(config: pytest.Config) -> None:
    # glibc hands blocks of over 32 MiB back to the kernel at every free, and every call then pays to have its outputs
    # and intermediates mapped again: most of an eager rival's time. "default" is that, what a user gets who does
    # nothing; "keep" has freed memory kept for all sides, as jemalloc and tcmalloc do.
    if platform.system() == "Linux" and config.getoption("--allocator") == "keep":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", metafunc.module.SUITE.rows(_device(metafunc.config)), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> Runner:
    try:
        pytestconfig.stash[PEAKS] = _peaks.measure(_device(pytestconfig))
    except RuntimeError as error:
        pytestconfig.stash[PEAKS] = str(error)
    option = pytestconfig.getoption
    return Runner(Limits(option("--budget"), option("--call-bound"), option("--memory-bound"), option("--rounds")))


@pytest.fixture
def measure(runner: Runner, benchmark, request: pytest.FixtureRequest):
    """``measure(SUITE, row)`` is the whole body of a benchmark."""

    def run(suite, row) -> None:
        if platform.system() == "Linux":
            ctypes.CDLL(None).malloc_trim(0)  # what one row's rivals took is not the next row's
        benchmark.group = f"{suite.op} {row.sample.name} {row.direction}"
        try:
            benchmark.extra_info.update(runner.measure(suite, row, benchmark, request.module.__name__))
        except segops.BackendError as error:
            pytest.skip(str(error))
        except WrongResult as error:
            request.config.stash.setdefault(FAILED, []).append({"op": suite.op, "sentence": str(error)})
            pytest.fail(f"FAIL, not timed: {error}", pytrace=False)

    return run


def pytest_benchmark_update_json(config: pytest.Config, benchmarks, output_json: dict) -> None:
    device, peaks = _device(config), config.stash.get(PEAKS, "not measured")
    if isinstance(peaks, _peaks.Peaks):
        peaks = _peaks.measure(device, peaks)  # again at the end: the better of the two
    for entry in output_json["benchmarks"]:
        result = entry["extra_info"]
        seconds = result["seconds"]["segops"]["min"]
        yardsticks = {"floor": peaks} | ({"reference_floor": _peaks.REFERENCE} if device == "cpu" else {})
        for name, yardstick in yardsticks.items():
            if isinstance(yardstick, _peaks.Peaks):
                result[name] = sum(yardstick.floor(work) for work in work_of(result))
                result[f"percent_of_{name}"] = 100 * result[name] / seconds
    output_json["segops"] = {
        "device": device,
        "machine": _machine(device),
        "allocator": config.getoption("--allocator"),
        "versions": {package: _version(package) for package in ("segops", "torch", "triton", "natten")},
        "peaks": peaks.as_dict() if isinstance(peaks, _peaks.Peaks) else {"reason": peaks},
        "failed": config.stash.get(FAILED, []),
    }


def _machine(device: str) -> dict:
    machine = {"python": platform.python_version(), "threads": torch.get_num_threads(), "cpu": platform.machine()}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            machine["cpu"] = line.split(":", 1)[1].strip()
            break
    if _native.why_not("_C") is None:
        machine["isa"] = _native.cpu_isa()
    if device == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return machine


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
