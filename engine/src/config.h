// What a model's metadata says of its shape: read once, checked once.
#pragma once

#include <cstdint>
#include <string>

#include "gguf_file.h"
#include "kv4/status.h"

namespace kv4::engine {

struct Config {
  std::string architecture;
  std::int64_t layers = 0;
  std::int64_t embedding = 0;     // channels of the residual stream
  std::int64_t feed_forward = 0;  // channels inside the MLP
  std::int64_t heads = 0, kv_heads = 0;
  std::int64_t head_dim_k = 0, head_dim_v = 0;
  std::int64_t rope_dim = 0;      // channels of a head that are rotated
  std::int64_t vocabulary = 0;
  std::int64_t context = 0;       // tokens that the model was trained on
  float norm_eps = 0;
  float rope_base = 10000, rope_scale = 1;              // angle = position * scale * base^(-2 i / rope_dim)
  float local_rope_base = 10000, local_rope_scale = 1;  // of layers with a sliding window
  std::int64_t sliding_window = 0;   // newest tokens that a sliding layer sees; 0: no layer slides
  std::int64_t sliding_pattern = 0;  // every so many layers one is global, the last of them
  float attention_scale = 0;         // multiplies q.k
  float final_softcap = 0;           // > 0: logits = softcap * tanh(logits / softcap)

  bool slides(std::int64_t layer) const {
    return sliding_window > 0 && (sliding_pattern == 0 || layer % sliding_pattern < sliding_pattern - 1);
  }
};

// The keys that all architectures share, under the prefix that general.architecture gives.
// Errors: invalid_argument for a missing, malformed or implausible key; unsupported for a RoPE scaling that is not built,
// and for a file that is a part of a model or none.
Status read_config(const GgufFile& file, Config* out);

// After all that is known was read. Errors: unsupported for a key of the architecture that nobody asked for and whose value may
// change what the model computes.
Status refuse_unknown(const GgufFile& file, const Config& config);

}  // namespace kv4::engine
