#!/usr/bin/env bash
# Installs the Debian packages that a step needs, where this is Debian and root runs it; says what to install
# where it is not. Does nothing where everything is there.
#
#   setup_system.sh build    a C++ compiler and Python's venv; GTest. Fails where they cannot be had.
#   setup_system.sh bench    google-benchmark. Fails where it cannot be had.
#   setup_system.sh cross    the Arm cross compiler and emulator. Never fails: those tests are then left out.
#   setup_system.sh fuzz     clang 19 with libFuzzer; nlohmann's JSON. Fails where they cannot be had.
#   setup_system.sh isas     qemu-user, which runs x86-64 programs on older processors. Never fails, likewise.
#   setup_system.sh metal    clang 19, which compiles the Metal kernels for their emulator. Never fails, likewise.
set -euo pipefail

step=${1:?step: expected build, bench, cross, fuzz, isas or metal; got nothing}
python=${PYTHON:-python3}
missing=()

need() { # package, test command...
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}

# g++ or clang++ that compiles C++20, from GCC 12 on.
compiles() {
  printf '#if !(__GNUC__ >= 12 || __clang_major__ >= 14)\n#error\n#endif\nint main() {}\n' |
    "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only -
}
# Only clang has it as a package of its own.
openmp() {
  echo 'int main() {}' | "${CXX:-c++}" -fopenmp -x c++ - -o /dev/null
}
gtest() {
  echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - || test -d /usr/src/googletest
}

# Versions 19 to 21, with AddressSanitizer's shared library.
metal() {
  local cxx
  for cxx in clang++-19 clang++-20 clang++-21; do
    command -v "$cxx" && test -f "$("$cxx" -print-file-name=libclang_rt.asan-x86_64.so)" && return 0
  done
  return 1
}

fuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++-19 -fsanitize=fuzzer,address -x c++ - -o /dev/null
}
header() {
  echo "#include <$1>" | "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only -
}
benchmark() {
  header benchmark/benchmark.h
}

case $step in
  build)
    need g++ compiles
    need "libomp-$("${CXX:-c++}" -dumpversion | cut -d. -f1)-dev" openmp
    need make command -v make
    need python3-venv "$python" -c 'import ensurepip, venv'
    need python3-dev "$python" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")'
    need libgtest-dev gtest
    need ccache command -v ccache
    ;;
  cross)
    need g++-aarch64-linux-gnu command -v aarch64-linux-gnu-g++
    need qemu-user command -v qemu-aarch64
    need googletest test -d /usr/src/googletest
    ;;
  isas)
    need qemu-user command -v qemu-x86_64
    ;;
  metal)
    need clang-19 metal
    need libclang-rt-19-dev metal
    ;;
  fuzz)
    need clang-19 command -v clang++-19
    need libclang-rt-19-dev fuzzer
    need nlohmann-json3-dev header nlohmann/json.hpp
    ;;
  bench)
    need libbenchmark-dev benchmark
    ;;
  *)
    echo "step: expected build, bench, cross, fuzz, isas or metal; got $step" >&2
    exit 2
    ;;
esac
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  echo "installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  if apt-get update -qq >"$log" 2>&1 && apt-get install -y -qq --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
    rm -f "$log"
    exit 0
  fi
  tail -n 5 "$log" >&2
  rm -f "$log"
fi

echo "missing on this machine: ${missing[*]} (Debian's names; there: apt-get install ${missing[*]})" >&2
# ccache only saves time, and GTest only serves the tests.
for package in "${missing[@]}"; do
  case $step:$package in build:ccache | build:libgtest-dev | cross:* | isas:* | metal:*) ;; *) exit 1 ;; esac
done
