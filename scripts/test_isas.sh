#!/usr/bin/env bash
# The C++ tests on each instruction set: test_isas.sh TESTS ISA...
#
# First on those named, which this machine runs: one process each, in which no other may run. Then on two older x86-64
# processors under qemu, where an instruction that the processor lacks traps: one with SSE3 alone, which leaves the portable
# kernels, and one with AVX2. qemu has neither AVX-VNNI, AVX-512 nor AMX: those are tested where a machine has them.
set -euo pipefail

tests=${1:?tests: expected the test program; got nothing}
: "${2:?isa: expected the instruction sets of this machine; got none}"
shift
# Slow and the same on every instruction set; and death tests, which start the program anew, outside qemu.
left_out='*DeathTest*:*MatrixIsOrthonormal*:*DenseInverse*:*BinaryDouble*:*EveryEvenDimension*:*ARefusedCallLeavesNoTrace*'
left_out+=':*RefusedCalls*:*FindsNoHostMemory*:*RandomPrograms*:*Ledger*:*LiesUnderRightChecksums*:*SavedCase*:*Sessions*'
left_out+=':*DecodingSixtyFour*:*AHostLendsItsThreads*'

for isa in "$@"; do
  echo "== $isa"
  KV4_CPU_ISA=$isa "$tests" --gtest_brief=1
done

if [ "$(uname -m)" != x86_64 ] || ! command -v qemu-x86_64 >/dev/null; then
  echo "older processors left out: they need qemu-x86_64 on x86-64 Linux (Debian: qemu-user)"
  exit 0
fi
emulated() { # processor of qemu's, instruction set that is the best there
  echo "== $2, emulated on qemu's $1"
  # Chosen by the processor; then required, so that nothing else can have run.
  qemu-x86_64 -cpu "$1" "$tests" --gtest_filter='Isa*:-*DeathTest*' --gtest_brief=1
  KV4_CPU_ISA=$2 qemu-x86_64 -cpu "$1" "$tests" --gtest_filter="-$left_out" --gtest_brief=1
}
emulated qemu64 portable
emulated Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid avx2
