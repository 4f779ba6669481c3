#include "attention/output.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "attention/arguments.h"

namespace kv4 {
namespace {

bool empty(const std::array<std::int64_t, 4>& shape) { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }

// Whether each axis' stride exceeds the extent of all axes with smaller strides, so that no two elements overlap. Other
// layouts without overlap are not used in practice.
bool apart(const MutableTensorView& x) {
  std::array<std::pair<std::int64_t, std::int64_t>, 4> axes;  // stride, steps
  for (std::size_t i = 0; i < 4; ++i) axes[i] = {std::abs(x.stride[i]), x.shape[i] - 1};
  std::sort(axes.begin(), axes.end());
  std::int64_t reach = 0;
  for (const auto& [stride, steps] : axes) {
    if (steps == 0) continue;
    if (stride <= reach) return false;
    reach += stride * steps;
  }
  return true;
}

// Addresses [first, second) of a view's rows of channels.
using Range = std::pair<std::uintptr_t, std::uintptr_t>;

template <class View>
Range whole(const View& x) {
  const auto size = static_cast<std::int64_t>(size_of(x.dtype));
  std::int64_t low = 0, high = x.shape[3] * size;
  for (std::size_t i = 0; i < 3; ++i) {
    const std::int64_t far = (x.shape[i] - 1) * x.stride[i] * size;
    (far < 0 ? low : high) += far;
  }
  const auto base = reinterpret_cast<std::uintptr_t>(x.data);
  return {base + static_cast<std::uintptr_t>(low), base + static_cast<std::uintptr_t>(high)};
}

template <class View>
std::vector<Range> rows(const View& x) {
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(x.shape[3]) * size_of(x.dtype);
  std::vector<Range> ranges;
  ranges.reserve(static_cast<std::size_t>(x.shape[0] * x.shape[1] * x.shape[2]));
  for (std::int64_t b = 0; b < x.shape[0]; ++b)
    for (std::int64_t h = 0; h < x.shape[1]; ++h)
      for (std::int64_t t = 0; t < x.shape[2]; ++t) {
        const auto at = reinterpret_cast<std::uintptr_t>(x.at(b, h, t));
        ranges.emplace_back(at, at + bytes);
      }
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

bool meet(const Range& a, const Range& b) { return a.first < b.second && b.first < a.second; }

template <class A, class B>
bool share(const A& a, const B& b) {
  if (empty(a.shape) || empty(b.shape) || !meet(whole(a), whole(b))) return false;
  // One buffer may hold both interleaved, as fused projections do.
  const std::vector<Range> left = rows(a), right = rows(b);
  for (std::size_t i = 0, j = 0; i < left.size() && j < right.size();) {
    if (meet(left[i], right[j])) return true;
    left[i].second <= right[j].first ? ++i : ++j;
  }
  return false;
}

Status shared(const char* name, const char* other) {
  return invalid_argument(name, "memory of its own", std::string("memory that ") + other + " shares");
}

}  // namespace

Status check_places(const MutableTensorView& out, const TensorView* q) {
  if (empty(out.shape)) return {};
  if (out.data == nullptr) return invalid_argument("out", "data", "a null pointer");
  if (!apart(out))
    return invalid_argument("out", "a place of its own for every element",
                            "strides " + shape_text(out.stride) + " over shape " + shape_text(out.shape));
  return q != nullptr && share(out, *q) ? shared("out", "q") : Status();
}

Status check_places(const PartialState& state, const TensorView& q, int dim) {
  const std::int64_t count = q.shape[0] * q.shape[1] * q.shape[2];
  const auto flat = [](float* data, std::int64_t n) {
    return MutableTensorView{data, DType::f32, {1, 1, 1, n}, {n, n, n, 1}};
  };
  const struct {
    const char* name;
    MutableTensorView view;
  } arrays[] = {{"o", flat(state.o, count * dim)}, {"m", flat(state.m, count)}, {"l", flat(state.l, count)}};
  for (std::size_t i = 0; i < 3; ++i) {
    if (share(arrays[i].view, q)) return shared(arrays[i].name, "q");
    for (std::size_t j = 0; j < i; ++j)
      if (share(arrays[i].view, arrays[j].view)) return shared(arrays[i].name, arrays[j].name);
  }
  return {};
}

}  // namespace kv4
