"""Peak memory of one call: the high-water mark of a fresh process on the CPU, the allocator's on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import resource
import time
from functools import cache
from pathlib import Path

import _calls
import torch
from _suite import Row, Suite

_M_MMAP_THRESHOLD = -3


def of_row(
    suite: Suite, module: str, row: Row, rival: tuple[int, str] | None, seconds: float, gigabytes: float
) -> dict:
    """Memory of ``row`` (or of rival (index, layout) on it): {"extra_bytes", "seconds"}, or {"reason"}.

    ``extra_bytes`` is what the call took beyond its outputs. ``module`` is the bench_X that holds ``SUITE``.
    """
    if row.device == "cuda":
        return _on_gpu(suite, row, rival)
    where = [str(row) for row in suite.rows(row.device)].index(str(row))
    receiver, sender = _server().Pipe(duplex=False)
    arguments = (sender, module, row.device, where, rival, torch.get_num_threads(), gigabytes)
    process = _server().Process(target=_child, args=arguments)
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(seconds) else {"reason": f"over {seconds:.0f} s"}
    except EOFError:
        answer = {"reason": f"killed within the memory bound of {gigabytes:.0f} GB"}
    process.kill()
    process.join()
    return answer


@cache
def _server():
    """Forks from a process that has imported torch and run nothing: as good as fresh, without seconds of import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "segops", "_calls"])
    return context


def _child(sender, module: str, device: str, where: int, rival, threads: int, gigabytes: float) -> None:
    try:
        sender.send(_measure(module, device, where, rival, threads, gigabytes))
    except Exception as error:
        text = str(error).strip().splitlines()
        memory = isinstance(error, MemoryError) or "allocate memory" in str(error) or "alloc" in type(error).__name__
        reason = f"more than {gigabytes:.0f} GB" if memory else (text[0][:200] if text else type(error).__name__)
        sender.send({"reason": reason})


def _measure(module: str, device: str, where: int, rival, threads: int, gigabytes: float) -> dict:
    torch.set_num_threads(threads)
    # By default glibc raises the threshold after the first large free; memory is then reused, or not, by luck.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    suite = importlib.import_module(module).SUITE
    row = suite.rows(device)[where]
    with _calls.chosen(row):
        if rival is None:
            _calls.ours(suite, row, suite.tiny(row.sample))()
            call = _calls.ours(suite, row)
        else:
            contender, layout = suite.rivals[rival[0]], rival[1]
            if not contender.compiled:
                _calls.theirs(contender, layout, row, suite.tiny(row.sample))()
            call = _calls.theirs(contender, layout, row)
        limit = _status("VmSize") + int(gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if row.direction != _calls.FORWARD or (rival is not None and contender.compiled):
            call()  # compiles, and draws the upstream gradient
        extra, seconds = zip(*(_one(call) for _ in range(3 if rival is None else 1)), strict=True)
    return {"extra_bytes": min(extra), "seconds": min(seconds)}


def _one(call: _calls.Call) -> tuple[int, float]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = _status("VmRSS"), time.perf_counter()
    outputs = call()
    seconds = time.perf_counter() - start
    return max(0, _status("VmHWM") - before - sum(x.nbytes for x in outputs)), seconds


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _on_gpu(suite: Suite, row: Row, rival) -> dict:
    try:
        with _calls.chosen(row):
            call = _calls.ours(suite, row) if rival is None else _calls.theirs(suite.rivals[rival[0]], rival[1], row)
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            outputs = call()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in outputs)
    except (torch.cuda.OutOfMemoryError, RuntimeError, NotImplementedError) as error:
        return {"reason": (str(error).splitlines() or [type(error).__name__])[0][:200]}
    finally:
        torch.cuda.empty_cache()
    return {"extra_bytes": extra, "seconds": seconds}
