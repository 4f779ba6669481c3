// For programs of llama.cpp that load no backends of themselves: loaded with the program (LD_PRELOAD), loads those of
// KV4_LLAMA_BACKENDS, and what GGML_BACKEND_PATH names.
#include <cstdlib>

#include "ggml-backend.h"

namespace {
[[gnu::constructor]] void load() { ggml_backend_load_all_from_path(std::getenv("KV4_LLAMA_BACKENDS")); }
}  // namespace
