"""What a compiled GPU object says about itself: resources, code, width of loads, mix of the hottest loop, occupancy.

NVIDIA objects are read with the cuobjdump that Triton ships; it takes Triton's cubins and nvcc's objects alike.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of SASS: ``LDG.E.128`` is the opcode, ``LDG`` its mnemonic."""

    address: int
    opcode: str
    operands: str

    @property
    def mnemonic(self) -> str:
        return self.opcode.split(".")[0]


class _Limits(NamedTuple):
    warps: int
    blocks: int
    shared: int


# CUDA programming guide, "Technical Specifications per Compute Capability": per multiprocessor; 64 Ki registers on all.
_LIMITS = {80: _Limits(64, 32, 164 << 10), 86: _Limits(48, 16, 100 << 10), 89: _Limits(48, 24, 100 << 10)}
_LIMITS[90] = _LIMITS[100] = _Limits(64, 32, 228 << 10)
_RESERVED_SHARED = 1024  # the runtime's own share of a block's shared memory

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LOAD = re.compile(r"^LDG(?:\.[A-Z0-9_]+)*?\.(U8|S8|U16|S16|64|128|256)\b")
_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")
_UNITS = {
    "FFMA": ("FFMA", "FFMA2", "HFMA2", "DFMA"),
    "tensor": ("HMMA", "HGMMA", "DMMA", "IMMA", "QGMMA", "IGMMA"),
    "MUFU": ("MUFU",),
    "SHFL": ("SHFL",),
    "LDS": ("LDS", "LDSM"),
    "LDG": ("LDG", "LDGSTS"),
}


def resource_usage(path: str | Path) -> dict[str, dict[str, int]]:
    """Kernel name to registers, stack, shared (static only), local; a stack is what spills live in."""
    text = _cuobjdump("--dump-resource-usage", path)
    found = re.findall(r"Function (\S+?):?\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: {"registers": int(registers), "stack": int(stack), "shared": int(shared), "local": int(local)}
        for name, registers, stack, shared, local in found
    }


def sass(path: str | Path) -> dict[str, list[Instruction]]:
    """Kernel name to its instructions in program order."""
    kernels: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in _cuobjdump("-sass", path).splitlines():
        if "Function :" in line:
            current = kernels.setdefault(line.split("Function :")[1].strip(), [])
        elif (match := _LINE.match(line)) and match[2] != "NOP":
            current.append(Instruction(int(match[1], 16), match[2], match[3].strip()))
    return kernels


def load_widths(instrs: Sequence[Instruction]) -> dict[str, int]:
    """Bits to number of global load instructions of that width, LDG and LDGSTS (cp.async) together."""
    widths: Counter[int] = Counter()
    for instr in instrs:
        if instr.mnemonic in ("LDG", "LDGSTS"):
            match = _LOAD.match(instr.opcode.replace("LDGSTS", "LDG"))
            widths[int(match[1].lstrip("US")) if match else 32] += 1
    return {str(bits): widths[bits] for bits in sorted(widths)}


def hot_loop(instrs: Sequence[Instruction]) -> Sequence[Instruction]:
    """The longest loop that contains no other loop; all of the kernel where nothing branches back."""
    loops = []
    for instr in instrs:
        # The branch to itself that ends every kernel is no loop.
        if instr.mnemonic == "BRA" and (match := _TARGET.search(instr.operands)):
            start = int(match[1], 16)
            if start < instr.address:
                loops.append((start, instr.address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        return instrs
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return [instr for instr in instrs if first <= instr.address <= last]


def hot_loop_mix(instrs: Sequence[Instruction]) -> dict[str, float]:
    """Share of what the hottest loop issues, by unit, with its number of instructions."""
    loop = hot_loop(instrs)
    counts = Counter(instr.mnemonic for instr in loop)
    mix: dict[str, float] = {"instructions": len(loop)}
    for unit, mnemonics in _UNITS.items():
        mix[unit] = round(sum(counts[name] for name in mnemonics) / max(len(loop), 1), 3)
    return mix


def tensor_core(instrs: Sequence[Instruction]) -> bool:
    return any(instr.mnemonic in _UNITS["tensor"] for instr in instrs)


def occupancy(arch: int | str, registers: int, shared: int, threads: int) -> float:
    """Resident warps over the most a multiprocessor takes; ``shared`` is static plus dynamic, bytes per block."""
    limits = _LIMITS[int(str(arch).removeprefix("sm_").rstrip("a"))]
    warps = -(-threads // 32)
    # Registers come in units of 256 per warp, warps in fours (one per scheduler), shared memory in units of 128 bytes.
    registers_per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = (65536 // registers_per_warp) // 4 * 4 // warps
    by_shared = limits.shared // (-(-(shared + _RESERVED_SHARED) // 128) * 128)
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return round(blocks * warps / limits.warps, 3)


@cache
def cuobjdump_path() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _cuobjdump(option: str, path: str | Path) -> str:
    # nvdisasm stands beside cuobjdump and is looked for on PATH.
    tool = cuobjdump_path()
    done = subprocess.run(
        [tool, option, path], capture_output=True, text=True, check=True, env={"PATH": f"{tool.parent}:/usr/bin:/bin"}
    )
    return done.stdout
