#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, on a machine that has one: the tests, the same under compute-sanitizer, the
# benchmarks; and the Python package's, where KV4_PYTHON names an interpreter that has it with torch and pytest.
# racecheck's reports on attend_fused: docs/notes/cuda.md.
# Usage: check_gpu.sh BUILD_DIR [TESTS BENCH]; builds BUILD_DIR unless the two programs are given.
set -euo pipefail
build=${1:?usage: check_gpu.sh BUILD_DIR [TESTS BENCH]}
tests=${2:-$build/tests/kv4_cuda_tests}
bench=${3:-$build/bench/kv4_cuda_bench}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
  { echo "check_gpu.sh: expected a machine with an NVIDIA GPU; nvidia-smi finds none" >&2; exit 1; }
if [ $# -lt 3 ]; then
  cmake -S "$(dirname "$0")/.." -B "$build" -DCMAKE_BUILD_TYPE=Release -DKV4_CUDA=ON -DKV4_BUILD_BENCH=ON
  cmake --build "$build" --target kv4_cuda_tests kv4_cuda_bench
fi
failed=0  # a failure does not stop the remaining steps
"$tests" --gtest_brief=1 || failed=1
if command -v compute-sanitizer >/dev/null; then
  # The largest scenes left out: the tools run hundreds of times slower.
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    filter='*PartOfOne*:*PartsOf*:*PagesTogether*:*Ragged*:*Partial*:*General*:*LargeMeans*'
    # Left out: under a tool, creating a cache waits for every stream, and that test checks that it does not.
    [ "$tool" != memcheck ] || filter+=':CudaExtend.*:CudaShared.*:CudaStreams.*-CudaStreams.ANewCacheIsWholeOnAnyStream'
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$tests" --gtest_brief=1 --gtest_filter="$filter" | tail -n 4 || failed=1
  done
fi
"$bench" --benchmark_filter="${KV4_BENCH_FILTER:-.}" --benchmark_counters_tabular=true || failed=1
if [ -n "${KV4_PYTHON:-}" ]; then
  "$KV4_PYTHON" -m pytest -q "$(dirname "$0")/../tests/python/test_hf_cuda.py" || failed=1
  "$KV4_PYTHON" -c 'from kv4.cli import app; app()' bench attention --device cuda || failed=1
  "$KV4_PYTHON" -c 'from kv4.cli import app; app()' bench generate --device cuda --shape llama-3-8b --random --contexts 4k,32k,128k || failed=1
fi
exit $failed
