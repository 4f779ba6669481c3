#include "attention/visibility.h"

#include <algorithm>

#include "format/convert.h"

namespace kv4 {
namespace {

bool hides(const void* mask, DType dtype, std::int64_t index) {
  if (dtype == DType::f32) return !(static_cast<const float*>(mask)[index] > hidden_by(dtype));
  const std::uint16_t h = static_cast<const std::uint16_t*>(mask)[index];
  return !((dtype == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h)) > hidden_by(dtype));
}

}  // namespace

Visibility::Visibility(const AttendArgs& args, const Queries& queries, std::int64_t length)
    : args_(args), input_(queries.input), input_row_(queries.input_row), first_query_(length - queries.count),
      queries_(queries.count),
      start_(args.mask.start != nullptr ? args.mask.offset + args.mask.start[queries.index] : 0),
      window_(args.mask.window != nullptr ? args.mask.window[queries.index] : queries.window) {}

bool Visibility::general_visible(std::int64_t t, std::int64_t position) const {
  const Mask& m = args_.mask;
  if (m.general == nullptr) return true;  // in memory that the host cannot read
  const std::int64_t column = position - m.offset;
  if (column < 0 || column >= m.columns) return false;
  const std::int64_t heads = m.general_stride[1] == 0 ? 1 : args_.q.shape[1];
  for (std::int64_t h = 0; h < heads; ++h) {
    const std::int64_t index = input_ * m.general_stride[0] + h * m.general_stride[1] +
                               (input_row_ + t) * m.general_stride[2] + column * m.general_stride[3];
    const bool hidden = m.kind == Mask::General::boolean ? static_cast<const std::uint8_t*>(m.general)[index] == 0
                                                         : hides(m.general, m.general_dtype, index);
    if (!hidden) return true;
  }
  return false;
}

bool Visibility::visible(std::int64_t t, std::int64_t position) const {
  const std::int64_t query = first_query_ + t;
  if (position < start_ || (args_.mask.causal && position > query)) return false;
  if (window_ > 0 && position <= query - window_) return false;
  return args_.mask.kind == Mask::General::none || general_visible(t, position);
}

bool Visibility::seen(std::int64_t position) const {
  if (args_.mask.kind == Mask::General::none) {
    // If any query sees the token, the one at its own position does, or the first one if the call starts later.
    const std::int64_t own = std::clamp<std::int64_t>(position - first_query_, 0, queries_ - 1);
    return queries_ > 0 && visible(own, position);
  }
  for (std::int64_t t = 0; t < queries_; ++t)
    if (visible(t, position)) return true;
  return false;
}

void Visibility::leave_hidden(std::vector<std::int64_t>* positions) const {
  // Late queries see most: a position they do not see is rarely visible to earlier ones, only through a window or a
  // hole.
  for (std::int64_t t = queries_ - 1; t >= 0 && !positions->empty(); --t)
    std::erase_if(*positions, [&](std::int64_t position) { return visible(t, position); });
}

}  // namespace kv4
