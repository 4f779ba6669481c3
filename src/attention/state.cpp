#include <cmath>
#include <limits>

#include "format/convert.h"
#include "kv4/attention.h"

namespace kv4 {

void merge(const PartialState& into, const PartialState& from, std::int64_t rows, int dim) {
  for (std::int64_t r = 0; r < rows; ++r) {
    if (from.l[r] == 0) continue;
    float* o = into.o + r * dim;
    const float* o_from = from.o + r * dim;
    if (into.l[r] == 0) {
      for (int c = 0; c < dim; ++c) o[c] = o_from[c];
      into.m[r] = from.m[r];
      into.l[r] = from.l[r];
      continue;
    }
    const float m = from.m[r] > into.m[r] ? from.m[r] : into.m[r];
    const float a = std::exp(into.m[r] - m), b = std::exp(from.m[r] - m);
    for (int c = 0; c < dim; ++c) o[c] = a * o[c] + b * o_from[c];
    into.m[r] = m;
    into.l[r] = a * into.l[r] + b * from.l[r];
  }
}

void finish(const PartialState& state, const float* sinks, const MutableTensorView& out) {
  const std::int64_t heads = out.shape[1], queries = out.shape[2];
  const int dim = static_cast<int>(out.shape[3]);
  std::int64_t row = 0;
  for (std::int64_t b = 0; b < out.shape[0]; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t t = 0; t < queries; ++t, ++row) {
        const float m = state.m[row], l = state.l[row];
        // The larger of the row's maximum and the sink is the reference, so that neither exponential overflows.
        float factor = 0;
        if (l != 0) {
          const float top = sinks != nullptr && sinks[h] > m ? sinks[h] : m;
          const float weight = std::exp(m - top);
          factor = weight / (weight * l + (sinks != nullptr ? std::exp(sinks[h] - top) : 0.0f));
        }
        const float* o = state.o + row * dim;
        void* to = out.at(b, h, t);
        for (int c = 0; c < dim; ++c) {
          const float x = l != 0 ? o[c] * factor : 0.0f;
          if (out.dtype == DType::f32) static_cast<float*>(to)[c] = x;
          else static_cast<std::uint16_t*>(to)[c] = out.dtype == DType::f16 ? f32_to_f16(x) : f32_to_bf16(x);
        }
      }
    }
  }
}

}  // namespace kv4
