#!/usr/bin/env bash
# Builds llama.cpp with backends that it loads as it runs, once, from the source inside the package llama-cpp-python, outside this
# tree: setup_llama.sh PYTHON. The last line of its output is the folder, which holds source/ and build/bin/.
set -euo pipefail

python=${1:?python: expected the interpreter whose pip fetches the source; got nothing}
package=$(grep -v '^#' "$(dirname "$0")/../requirements-llama.txt")
version=${package##*==}
cache=${KV4_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/kv4}
folder=$cache/llama.cpp/$version
targets=(ggml-cpu llama-server llama-bench llama-perplexity test-llama-archs)

if [ ! -f "$folder/.built" ]; then
  mkdir -p "$folder"
  if [ ! -f "$folder/source/CMakeLists.txt" ]; then
    echo "fetching llama.cpp's source: $package" >&2
    scratch=$(mktemp -d "$folder/scratch.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest "$scratch" "$package" >&2
    mkdir "$scratch/source"
    tar xzf "$scratch"/*.tar.gz -C "$scratch/source" --strip-components=3 "llama_cpp_python-$version/vendor/llama.cpp"
    mv "$scratch/source" "$folder/source"
  fi
  settings=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=ON -DLLAMA_BUILD_EXAMPLES=OFF
    -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF)
  # Built for this processor; without the matrix unit. GCC's intrinsic that loads the unit's configuration does not say that it reads all
  # of it, and what it reads is then optimised away (seen with GCC 12: ggml's matrix products end in SIGSEGV or SIGILL).
  flags=-march=native
  if [ "$(uname -m)" = x86_64 ] && ! "${CXX:-c++}" --version | grep -qi clang; then
    flags="$flags -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
  fi
  echo "building llama.cpp: some ten minutes on two cores" >&2
  cmake -S "$folder/source" -B "$folder/build" -G Ninja "${settings[@]}" -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" >"$folder/build.log" 2>&1 &&
    cmake --build "$folder/build" --target "${targets[@]}" >>"$folder/build.log" 2>&1 ||
    { tail -n 30 "$folder/build.log" >&2; echo "llama.cpp: expected it to build; got what is above" >&2; exit 1; }
  touch "$folder/.built"
fi
echo "$folder"
