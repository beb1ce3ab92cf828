"""The Triton kernels at their shipped configurations, compiled without a GPU and read back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _sass
from segops.kernels._launch import TARGETS, Launch, aot_cases

Row = dict[str, Any]


def triton_rows(wanted: Callable[[str], bool] = lambda name: True) -> list[Row]:
    """One row per configuration and architecture; ``wanted`` chooses by name."""
    return [_row(name, launch, arch) for name, launch in aot_cases() if wanted(name) for arch in TARGETS]


def _row(name: str, launch: Launch, arch: str) -> Row:
    compiled = launch.compile(arch)
    row = {
        "kernel": name,
        "arch": arch,
        "threads": compiled.metadata.num_warps * compiled.metadata.warp_size,
        "shared": compiled.metadata.shared,
        "dot": "tt.dot" in compiled.asm["ttir"],
    }
    return row | (_amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled, arch, row))


def _nvidia(compiled: Any, arch: str, row: Row) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        [usage] = _sass.resource_usage(file.name).values()
        [instrs] = _sass.sass(Path(file.name)).values()
    return {
        "registers": usage["registers"],
        "spill_bytes": usage["stack"],
        "occupancy": _sass.occupancy(arch, usage["registers"], row["shared"], row["threads"]),
        "load_widths": _sass.load_widths(instrs),
        "hot_loop": _sass.hot_loop_mix(instrs),
        "tensor_core": _sass.tensor_core(instrs),
    }


def _amd(compiled: Any) -> Row:
    text = compiled.asm["amdgcn"]

    def metadata(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", text)
    width = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "ubyte": 8}
    widths: dict[int, int] = {}
    for load in loads:
        bits = width.get(load.split("_")[0], 16)
        widths[bits] = widths.get(bits, 0) + 1
    return {
        "registers": metadata("vgpr_count"),
        "scalar_registers": metadata("sgpr_count"),
        "spill_bytes": 4 * metadata("vgpr_spill_count"),
        "scalar_spills": metadata("sgpr_spill_count"),
        "load_widths": {str(bits): widths[bits] for bits in sorted(widths)},
        "tensor_core": "v_mfma" in text,
    }
