#!/usr/bin/env bash
# The C++ tests on each instruction set: test_isas.sh TESTS ISA...
#
# First on those named, which this machine runs: in processes in which no other may run, without the tests of
# tests/emulation.txt, which `make test-cpp` runs on the best of them. Then a few tests of every kernel on two older x86-64
# processors under qemu, where an instruction that the processor lacks traps: one with SSE3 alone, which leaves the portable
# kernels, and one with AVX2. qemu has neither AVX-VNNI, AVX-512 nor AMX: those are tested where a machine has them. Each
# run is shared by JOBS processes (by default one per processor).
set -euo pipefail

tests=${1:?tests: expected the test program; got nothing}
: "${2:?isa: expected the instruction sets of this machine; got none}"
shift
jobs=${JOBS:-$(nproc)}
on_older='Isa*:CAbi.*:Convert.*:Levels.*:Order.*:Attend.SoftcapAndSinks:Attend.OnlyPages*:Attend.ExactRows*:Attend.LargestSums*'
on_older+=':Cache.ArrivalSeals*:Cache.ShortTexts*:Masks.Causal:Paged.NaN*:Paged.Dequantised*:Paged.Lambda*:Rows.SomeRows*'
on_older+=':Rows.NonFinite*:Seal.Extreme*:TilesPath.ScaleGroups:TilesPath.LargestSums:Save.WidthsAre*:Save.RefinedKeys*'
on_older+=':*RotationDims.InPlace*/??'
left_out=$(grep -v '^#' "$(dirname "$0")/../tests/emulation.txt" | paste -sd:)
# Threads that wait sleep: the processes share the processors.
export OMP_WAIT_POLICY=passive

shared() { # command...: the test program, each process with its share of the tests
  local i pid failed=0 pids=()
  for ((i = 0; i < jobs; i++)); do
    GTEST_TOTAL_SHARDS=$jobs GTEST_SHARD_INDEX=$i "$@" --gtest_brief=1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

for isa in "$@"; do
  echo "== $isa"
  KV4_CPU_ISA=$isa shared "$tests" --gtest_filter="-$left_out"
  echo "== $isa: ${SECONDS} s so far"
done

if [ "$(uname -m)" != x86_64 ] || ! command -v qemu-x86_64 >/dev/null; then
  echo "older processors left out: they need qemu-x86_64 on x86-64 Linux (Debian: qemu-user)"
  exit 0
fi
emulated() { # processor of qemu's, instruction set that is the best there
  echo "== $2, emulated on qemu's $1"
  # Chosen by the processor; then required, so that nothing else can have run.
  qemu-x86_64 -cpu "$1" "$tests" --gtest_filter='Isa*:-*DeathTest*' --gtest_brief=1
  KV4_CPU_ISA=$2 shared qemu-x86_64 -cpu "$1" "$tests" --gtest_filter="$on_older:-$left_out"
  echo "== $2, emulated: ${SECONDS} s so far"
}
emulated qemu64 portable
emulated Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid avx2
