#!/usr/bin/env bash
# The C++ library and its tests on macOS, with Homebrew's cmake, ninja, googletest and libomp; the Metal backend's on the
# machine's GPU where it has one. Not run so far: no such machine was at hand when it was written.
set -euo pipefail
cd "$(dirname "$0")/.."
OpenMP_ROOT=$(brew --prefix libomp)
export OpenMP_ROOT
cmake -S . -B build/macos -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$(brew --prefix googletest)"
cmake --build build/macos
ctest --test-dir build/macos --output-on-failure
if system_profiler SPDisplaysDataType | grep -q 'Metal'; then
  build/macos/tests/metal/kv4_metal_device_tests
else
  echo "Metal tests left out: no GPU that has it"
fi
