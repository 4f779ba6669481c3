// FLASH_ATTN_EXT over a cache of packed and exact blocks.
#pragma once

#include <vector>

#include "ggml.h"
#include "layer.h"
#include "plan.h"

namespace kv4::llama {

// Of one context: the layers of a step have their masks in common, and so what follows from them.
class Attention {
 public:
  Status run(Layer* layer, const ggml_tensor* op);

 private:
  const Plan& plan_of(const MaskRows& mask, const Layer& layer, int first_stream);

  std::vector<Plan> plans_;
  std::size_t next_ = 0;
  std::vector<float> queries_;
};

}  // namespace kv4::llama
