// Which tokens a call's queries see, for one sequence of the batch: what the cache remembers of
// masks, and what it refuses. The kernels apply masks themselves.
#pragma once

#include <cstdint>

#include "kv4/attention.h"

namespace kv4 {

class Visibility {
 public:
  // `length`: tokens of the sequence, this call's included.
  Visibility(const AttendArgs& args, int row, std::int64_t length);

  // Some query head of row t sees the token at `position`.
  bool visible(std::int64_t t, std::int64_t position) const;
  // Some query of the call does.
  bool seen(std::int64_t position) const;

 private:
  bool general_visible(std::int64_t t, std::int64_t position) const;

  const AttendArgs& args_;
  int row_;
  std::int64_t first_query_;  // position of query row 0
  std::int64_t queries_;
  std::int64_t start_;        // first visible position
  std::int64_t window_;       // 0 = all
};

}  // namespace kv4
