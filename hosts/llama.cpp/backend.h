// kv4 as one of ggml's backends: a device that keeps the cache and answers attention over it; everything else stays
// with the CPU's.
#pragma once

#include "ggml-backend-impl.h"

namespace kv4::llama {

// Null where kv4 cannot serve this process, after one line that says why: llama.cpp then goes on with its own cache.
ggml_backend_reg_t registry();

}  // namespace kv4::llama
