// Which tokens a call's queries see, for one sequence of the batch. Caches use it to track tokens that no query has
// seen and to reject non-finite ones; the kernels apply masks themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kv4/attention.h"

namespace kv4 {

// An additive mask hides a column with -infinity or its dtype's lowest number: anything not above this.
constexpr float hidden_by(DType dtype) { return dtype == DType::f16 ? -65504.0f : -1e30f; }

class Visibility {
 public:
  // One sequence's queries in a call.
  struct Queries {
    std::size_t index = 0;       // of mask.start and mask.window
    std::int64_t input = 0;      // of q and the general mask: on axis 0
    std::int64_t input_row = 0;  // ... and on axis 2, of the first
    std::int64_t count = 0;
    std::int64_t window = 0;  // where the mask has none
  };
  // `length`: tokens of the sequence, this call's included.
  Visibility(const AttendArgs& args, const Queries& queries, std::int64_t length);

  // Some query head of query t sees the token at `position`.
  bool visible(std::int64_t t, std::int64_t position) const;
  // Whether `seen` takes constant time, whatever the number of queries.
  bool simple() const { return args_.mask.kind == Mask::General::none || queries_ == 1; }
  // Some query of the call sees the token at `position`.
  bool seen(std::int64_t position) const;
  // Keeps the positions that no query of the call sees, in order. Reads each element of the mask at most once.
  void leave_hidden(std::vector<std::int64_t>* positions) const;

 private:
  bool general_visible(std::int64_t t, std::int64_t position) const;

  const AttendArgs& args_;
  std::int64_t input_, input_row_;
  std::int64_t first_query_;  // position of the first query
  std::int64_t queries_;
  std::int64_t start_;   // first visible position
  std::int64_t window_;  // 0 = all
};

}  // namespace kv4
