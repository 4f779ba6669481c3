#!/usr/bin/env bash
# Builds and installs ggml and llama.cpp's library as the engine needs them: setup_engine.sh PYTHON
set -euo pipefail

python=${1:?python: expected the interpreter to install for; got nothing}
folder=$(dirname "$0")/..

# Only the library: no image or sound models.
settings=(-C cmake.define.LLAVA_BUILD=OFF)
# GCC's intrinsic that loads the matrix unit's configuration does not say that it reads all of it, and what it reads is then
# optimised away (seen with GCC 12: ggml's matrix products end in SIGSEGV or SIGILL on processors with AMX).
if [ "$(uname -m)" = x86_64 ] && ! "${CXX:-c++}" --version | grep -qi clang; then
  flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
  settings+=(-C "cmake.define.CMAKE_C_FLAGS=$flags" -C "cmake.define.CMAKE_CXX_FLAGS=$flags")
fi
echo "building ggml and llama.cpp's library: some five minutes on two cores"
# Without the cache: a wheel in it may have been built with other settings, and so may one that is installed. By name, since
# settings do not reach what a file of requirements names.
mapfile -t packages < <(grep -v '^#' "$folder/requirements-engine.txt")
"$python" -m pip install --quiet --no-cache-dir --force-reinstall --no-deps "${settings[@]}" "${packages[@]}"
