#include "reference/attend.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "format/convert.h"
#include "reference/seal.h"

namespace kv4::reference {
namespace {

double element(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const std::uint16_t h = static_cast<const std::uint16_t*>(data)[i];
  return dtype == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
}

double lowest(DType dtype) { return dtype == DType::f16 ? -65504.0 : -1e30; }

void append_side(const SideSpec& side, const std::uint8_t* packed, const std::uint8_t* scales, const std::uint8_t* mean,
                 int count, const float* lambda, const SecondRows* second, std::vector<double>* to) {
  std::vector<std::uint16_t> scale(static_cast<std::size_t>(side.groups) * count), m(side.dim);
  for (int g = 0; g < side.groups; ++g)
    std::memcpy(scale.data() + static_cast<std::size_t>(g) * count, scales + g * kPageTokens * 2,
                static_cast<std::size_t>(count) * 2);
  if (mean != nullptr) std::memcpy(m.data(), mean, m.size() * 2);
  std::vector<double> weight(side.dim, 1.0);
  if (lambda != nullptr) weight.assign(lambda, lambda + side.dim);
  const std::vector<double> rows = dequantise(side, from_canonical(packed, count, side.dim, side.levels.bits).data(),
                                              scale.data(), mean != nullptr ? m.data() : nullptr, count, weight.data(),
                                              second);
  to->insert(to->end(), rows.begin(), rows.end());
}

}  // namespace

void append_page(const PageSpec& spec, const std::uint8_t* slice, const std::uint8_t* k_codes,
                 const std::uint8_t* v_codes, int count, const float* lambda_k, const float* lambda_v, int head,
                 DenseTokens* to) {
  const SecondRows second = read_second_rows(spec, slice);
  append_side(spec.key, k_codes, slice + spec.layout.k_scales, spec.key.mean ? slice + spec.layout.k_mean : nullptr,
              count, lambda_k, &second, &to->k[static_cast<std::size_t>(head)]);
  append_side(spec.value, v_codes, slice + spec.layout.v_scales, nullptr, count, lambda_v, nullptr,
              &to->v[static_cast<std::size_t>(head)]);
}

bool visible(const Mask& mask, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t query_position,
             std::int64_t position, double* added) {
  *added = 0;
  if (mask.causal && position > query_position) return false;
  if (mask.start != nullptr && position < mask.offset + mask.start[b]) return false;
  if (mask.window != nullptr && mask.window[b] > 0 && position <= query_position - mask.window[b]) return false;
  if (mask.kind == Mask::General::none) return true;
  const std::int64_t column = position - mask.offset;
  if (column < 0 || column >= mask.columns) return false;
  const auto& s = mask.general_stride;
  const std::int64_t i = b * s[0] + h * s[1] + t * s[2] + column * s[3];
  if (mask.kind == Mask::General::boolean) return static_cast<const std::uint8_t*>(mask.general)[i] != 0;
  *added = element(mask.general, mask.general_dtype, i);
  return *added > lowest(mask.general_dtype);
}

Attention attend(const AttendArgs& args, int kv_heads, int head_dim_v, std::span<const DenseTokens> sequences,
                 std::span<const std::int64_t> query_position) {
  const TensorView& q = args.q;
  const std::int64_t batch = q.shape[0], heads = q.shape[1], queries = q.shape[2], dk = q.shape[3], dv = head_dim_v;
  const double scale = args.scale != 0 ? args.scale : 1 / std::sqrt(static_cast<double>(dk));
  Attention a;
  for (std::int64_t b = 0; b < batch; ++b) {
    const DenseTokens& tokens = sequences[static_cast<std::size_t>(b)];
    const std::size_t count = tokens.position.size();
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::size_t kv = static_cast<std::size_t>(h / (heads / kv_heads));
      const double* k = tokens.k[kv].data();
      const double* v = tokens.v[kv].data();
      for (std::int64_t t = 0; t < queries; ++t) {
        const void* row = q.at(b, h, t);
        std::vector<double> score(count, -std::numeric_limits<double>::infinity()),
            out(static_cast<std::size_t>(dv), 0.0);
        double m = -std::numeric_limits<double>::infinity();
        for (std::size_t j = 0; j < count; ++j) {
          double added;
          if (!visible(args.mask, b, h, t, query_position[static_cast<std::size_t>(b)] + t, tokens.position[j], &added))
            continue;
          double s = 0;
          for (std::int64_t c = 0; c < dk; ++c)
            s += element(row, q.dtype, c) * k[static_cast<std::int64_t>(j) * dk + c];
          s *= scale;
          if (args.softcap > 0) s = args.softcap * std::tanh(s / args.softcap);
          score[j] = s + added;
          m = std::fmax(m, score[j]);
        }
        double l = 0;
        std::vector<double> weight(count, 0.0);
        for (std::size_t j = 0; j < count; ++j) {
          if (score[j] == -std::numeric_limits<double>::infinity()) continue;
          weight[j] = std::exp(score[j] - m);
          l += weight[j];
        }
        const double denominator = l + (args.sinks != nullptr ? std::exp(args.sinks[h] - m) : 0.0);
        for (std::size_t j = 0; j < count && l > 0; ++j) {
          weight[j] /= denominator;
          for (std::int64_t c = 0; c < dv; ++c)
            out[static_cast<std::size_t>(c)] += weight[j] * v[static_cast<std::int64_t>(j) * dv + c];
        }
        a.out.insert(a.out.end(), out.begin(), out.end());
        a.weights.insert(a.weights.end(), weight.begin(), weight.end());
        a.m.push_back(m);
        a.l.push_back(l);
      }
    }
  }
  return a;
}

}  // namespace kv4::reference
