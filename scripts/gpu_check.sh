#!/usr/bin/env bash
# Everything that needs a GPU, in at most eight minutes: the tests marked `gpu`, then the bench.
#   scripts/gpu_check.sh [python] [options of the bench, such as --rehearse]
#   scripts/gpu_check.sh python3 --only fit_loop savings     the tests, then these parts of the bench
#   scripts/gpu_check.sh python3 --only integers    the tests, then of the bench what is about integers
#   LIMIT=200 scripts/gpu_check.sh        in at most so many seconds, of which the last 60 are the bench's;
#                                         it leaves parts out
# What comes out is written as it comes below $OUT (default: results/bench): tests.txt, gpu.json, gpu.md, bench.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
[ $# -gt 0 ] && shift
out=${OUT:-results/bench}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
began=$SECONDS limit=${LIMIT:-465}
tests_limit=$((limit - 60 < 200 ? limit - 60 : 200))
if [ "$tests_limit" -le 0 ]; then
  echo "LIMIT=$limit: too short; the bench alone wants 60 seconds" >&2
  exit 2
fi

# Kernels are compiled for many shapes: several processes, if pytest-xdist is there (pip install
# pytest-xdist beforehand, as the machine may have no network). What is launched singly because it
# can't be recorded is an error, with its traceback. A line for each test as it ends, and an interrupt
# instead of a kill: what failed is on the page even if there was no time for the rest.
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 6)
timeout -s INT -k 10 "$tests_limit" "$python" -m pytest -m gpu -vv "${workers[@]}" --tb=short \
  -W "error:training launches" -W "error:sampling step by step" \
  tests/runtime/test_graphs.py tests/fit/test_weight_update.py tests/fit/test_gradients.py \
  tests/models/test_compiled.py tests/deploy/test_gpu.py tests/quant/test_kernels_integer.py \
  tests/fit/test_training_graph.py tests/diffusion/test_denoising_graph.py \
  tests/quant/test_kernels_triton.py tests/runtime/test_processes.py \
  tests/fit/test_ahead.py 2>&1 | tee "$out/tests.txt" | tail -n 40
tests=${PIPESTATUS[0]}
echo "tests: exit code $tests after $((SECONDS - began)) s"

left=$((limit - (SECONDS - began)))
if [ "$left" -le 40 ]; then
  echo "bench: not begun, $left of $limit seconds are left"
  exit 1
fi
timeout "$left" "$python" scripts/bench/gpu.py --out "$out" --seconds $((left - 40)) "$@" 2>&1 | tee "$out/bench.txt" | tail -n 120
bench=${PIPESTATUS[0]}
echo "bench: exit code $bench after $((SECONDS - began)) s"
exit $((tests != 0 || bench != 0))
