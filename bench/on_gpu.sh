#!/usr/bin/env bash
# Everything a CUDA claim rests on, in one run on a machine with an NVIDIA card: build, opcheck, all tests, the sanitizers,
# the benches. Leaves OUT/<device>.json (each step's outcome, the bench's numbers) and OUT/<device>.log.
#
#   bench/on_gpu.sh [OUT]        OUT defaults to bench/results; PYTHON=python3 picks the interpreter, with a CUDA torch
#
# Every step has a limit, and together they stay inside nine minutes. A failed step does not stop the ones after it,
# but the script then exits with 1. Steps may be picked: STEPS="build tests" bench/on_gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${1:-bench/results}
STEPS=${STEPS:-build opcheck tests memcheck racecheck initcheck benches}
mkdir -p "$OUT"

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
  echo "on_gpu.sh: $PYTHON finds no CUDA device; run it where torch.cuda.is_available()" >&2
  exit 2
}
capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
log=$OUT/$device.log
outcomes=$OUT/$device.steps
: >"$log"
: >"$outcomes"

export MOTE_REQUIRE_CUDA=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
failed=0

# step NAME LIMIT_S COMMAND...: runs it when it is picked, and records how it went.
step() {
  local name=$1 limit_s=$2
  shift 2
  [[ " $STEPS " == *" $name "* ]] || return 0
  local start=$SECONDS code=0
  echo "== $name" | tee -a "$log"
  timeout --kill-after=10 "$limit_s" "$@" >>"$log" 2>&1 || code=$?
  echo "$name $code $((SECONDS - start))" >>"$outcomes"
  echo "   exit $code after $((SECONDS - start)) s" | tee -a "$log"
  if [[ $code != 0 ]]; then
    failed=1
    tail -n 40 "$log"
  fi
}

# The sanitizers see our allocations only when torch does not serve them from its cache; they watch our kernels alone.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name kns=mote \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider python_tests/test_linear_op.py -k "cuda and test_workloads"
}
export -f sanitize
export PYTHON

step build 120 env MOTE_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" \
  "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
step opcheck 45 "$PYTHON" -m pytest -q -x python_tests/test_torch_integration.py -k "cuda and opcheck"
step tests 130 "$PYTHON" -m pytest -q python_tests -k "cuda"
step memcheck 40 bash -c 'sanitize memcheck'
step racecheck 40 bash -c 'sanitize racecheck'
step initcheck 40 bash -c 'sanitize initcheck'
step benches 110 "$PYTHON" bench/bench_ops.py --device cuda --allow-busy --json "$OUT/$device.bench.json"

"$PYTHON" bench/report.py collect --steps "$outcomes" --bench "$OUT/$device.bench.json" --out "$OUT/$device.json" &&
  rm -f "$outcomes" "$OUT/$device.bench.json"
exit $failed
