"""Peak memory of one call; meant for a fresh process, where no free memory hides what the call takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_mib(call: Callable[[], object], device: str) -> float:
    """MiB that ``call()`` takes beyond what is there before: resident memory on a CPU, the allocator's on a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        resets.write_text("5")  # the high-water mark starts anew
    before = _high_water()
    call()
    return (_high_water() - before) / 2**20


def _high_water() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: a child inherits its parent's ru_maxrss through fork and exec; VmHWM starts anew.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
