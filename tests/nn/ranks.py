"""Two gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing


def of_two_ranks(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``function``, of a module, returns for either rank."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.multiprocessing.spawn(_rank, (function, str(folder)), nprocs=2)
    return [torch.load(folder / f"{index}.pt") for index in range(2)]


def _rank(index: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    torch.save(function(index), f"{folder}/{index}.pt")
    dist.destroy_process_group()
