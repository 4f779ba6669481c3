// Lambda that was measured on a text: what `kv4 calibrate` writes, a safetensors file of "layer.N.key.lambda"
// [kv_heads, head_dim], and of "layer.N.value.lambda" where values have one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kv4/status.h"

namespace kv4::llama {

struct Lambda {
  std::int64_t kv_heads = 0, head_dim = 0;
  std::vector<float> values;  // [kv_heads, head_dim]
};

class Calibration {
 public:
  // Errors: invalid_argument naming KV4_CALIBRATION: no such file, none of this kind, damaged, or of more than lambda.
  static Status read(const std::string& path, Calibration* out);
  // Of a file's bytes; `path` is what a message calls it.
  static Status parse(std::string_view bytes, const std::string& path, Calibration* out);

  bool has_values() const { return !values_.empty(); }
  // Of the model's layer `layer`; invalid_argument where there is none of this shape.
  Status keys_of(int layer, std::int64_t kv_heads, std::int64_t head_dim, std::vector<float>* out) const;
  Status values_of(int layer, std::int64_t kv_heads, std::int64_t head_dim, std::vector<float>* out) const;

 private:
  std::map<int, Lambda> keys_, values_;
};

// From the order of channels that files of transformers have, whose rotary pairs are c and c + n / 2 of the first n, to
// the one with pairs 2 c and 2 c + 1, which GGUF files of some architectures have.
void pair_neighbours(std::vector<float>* lambda, std::int64_t head_dim, std::int64_t n);

}  // namespace kv4::llama
