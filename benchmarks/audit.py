"""Static audit of every GPU kernel: registers, spills, shared memory, occupancy, width of loads, mix of the hot loop.

    python benchmarks/audit.py                       all kernels -> benchmarks/results/audit.json
    python benchmarks/audit.py --only NAME --output -   those whose name contains NAME, to the terminal; CUDA kernels
                                                     where NAME says /cuda/

Facts about the code, never its speed. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "audit.json"

# Both are read when triton is imported: what the interpreter wraps cannot be compiled, and the tests share the cache.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-aot"))
sys.path.insert(0, str(ROOT / "benchmarks"))


def audit(only: list[str] | None = None) -> dict[str, Any]:
    """Versions and one row per kernel configuration and architecture, sorted."""
    import _audit_cuda
    import _audit_triton
    import _sass
    import triton

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    rows = _audit_triton.triton_rows(wanted)
    versions = {"triton": triton.__version__, "ptxas": _version(_sass.cuobjdump_path().with_name("ptxas"))}
    if not only or any("/cuda/" in part for part in only):
        if reason := _audit_cuda.nvcc_missing():
            raise SystemExit(reason)
        versions["nvcc"] = _version("nvcc")
        rows += [row for row in _audit_cuda.cuda_rows() if wanted(row["kernel"])]
    return {"versions": versions, "rows": sorted(rows, key=lambda row: (row["kernel"], row["arch"]))}


def dumps(report: dict[str, Any]) -> str:
    """JSON with one row per line: a change of one kernel is a change of one line."""
    rows = ",\n".join("  " + json.dumps(row, sort_keys=True) for row in report["rows"])
    return f'{{\n "versions": {json.dumps(report["versions"], sort_keys=True)},\n "rows": [\n{rows}\n ]\n}}\n'


def _version(tool: str | Path) -> str:
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="part of a kernel's name; may be repeated")
    parser.add_argument("--output", default=str(RESULT), metavar="PATH", help="file, or - for the terminal")
    args = parser.parse_args()
    text = dumps(audit(args.only))
    if args.output == "-":
        sys.stdout.write(text)
    else:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
