#!/usr/bin/env bash
# Everything that needs a GPU, unattended and in under ten minutes: build, checks, battery, benchmarks, compute-sanitizer.
#
#     benchmarks/gpu_suite.sh OUT
#
# OUT receives a log per step, the benchmarks' JSON and summary.txt. A failed step does not stop the next; the exit
# status is 1 if any step failed. Wants torch with CUDA, Triton, pytest and pytest-benchmark in the Python named by
# PYTHON (python3), nvcc, and uses ncu and compute-sanitizer where they are. No network.
set -u -o pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2

python=${PYTHON:-python3}
deadline=570
failed=0
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
export SEGOPS_CUDA=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/build/triton-gpu}
unset TRITON_INTERPRET

printf '%-12s %-6s %7s  %s\n' step status seconds last_line | tee "$out/summary.txt"

# step NAME SECONDS COMMAND...: runs with its own limit, within what the whole suite has left.
step() {
  local name=$1 limit=$2 status=0 start=$SECONDS left=$((deadline - SECONDS))
  shift 2
  if ((left < limit)); then limit=$left; fi
  if ((limit < 5)); then
    status=skip
    echo "no time left" >"$out/$name.log"
  else
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || status=$?
  fi
  if [[ $status != 0 ]]; then failed=1; fi
  printf '%-12s %-6s %7d  %s\n' "$name" "$status" $((SECONDS - start)) \
    "$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c1-100)" | tee -a "$out/summary.txt"
}

have() { command -v "$1" >/dev/null 2>&1; }

step machine 30 bash -c "nvidia-smi; nvcc --version; $python -c '
import platform, torch, triton
print(platform.python_version(), torch.__version__, triton.__version__, torch.cuda.get_device_name())'"
step build 180 env MAX_JOBS="$(nproc)" "$python" -m pip install --no-build-isolation --no-deps --verbose -e .
step info 30 "$python" -m segops info
step check 90 "$python" benchmarks/gpu_check.py

# The battery on the lanes that run on the GPU; those that are emulated or interpreted need none.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
step battery 150 "$python" -m pytest tests/ops -q --durations=10 "${workers[@]}" \
  -k "(cuda or triton) and not emulated and not interpret and not aot"

# The shape of the gates and the scaling series first: should time run out, they are whole.
measure=("$python" -m pytest benchmarks/bench_*.py -q --device=cuda --rounds=10 --budget=0.3)
step benchmarks 150 "${measure[@]}" -k "ldv2_128 or scaling" --benchmark-json="$out/benchmarks.json"
step more 90 "${measure[@]}" -k "not ldv2_128 and not scaling" --benchmark-json="$out/benchmarks-more.json"

if have compute-sanitizer; then
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
      "$python" benchmarks/gpu_check.py --small
  done
fi
if have ncu; then
  # Each kernel once at the shape of the paper: what bounds it.
  step ncu 60 ncu --set detailed --kernel-name 'regex:(forward|query|key)_kernel' --launch-count 3 --csv --page raw \
    "$python" benchmarks/gpu_check.py --profile
fi

if ((failed)); then
  echo "some steps failed; logs in $out" | tee -a "$out/summary.txt"
  exit 1
fi
echo "all steps passed" | tee -a "$out/summary.txt"
