// For llama.cpp programs that do not load backends themselves: preloaded (LD_PRELOAD), this loads those in
// KV4_LLAMA_BACKENDS and the one that GGML_BACKEND_PATH names.
#include <cstdlib>

#include "ggml-backend.h"

namespace {
[[gnu::constructor]] void load() { ggml_backend_load_all_from_path(std::getenv("KV4_LLAMA_BACKENDS")); }
}  // namespace
