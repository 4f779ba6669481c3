// Which of a sequence's queries lambda is learnt from. Energies of queries before the first page is due are stored by
// position until lambda is fixed, so that crops and repeated calls leave no trace and call sizes do not matter: a
// running sum could not be cropped. Storing every query's energies would take as many bytes as fp16 keys and values, so
// one query in kQueryStride is sampled, starting at the first unmasked one and taking the last of each group, which
// leaves out the untypical first token. Sampling suffices: lambda follows nearly the fourth root of the mean energy,
// and near the optimum the loss is quadratic in lambda's error.
#pragma once

#include <cstdint>

#include "ledger/extent.h"
#include "ledger/ledger.h"

namespace kv4::ledger {

struct Queries {
  std::int64_t first = -1;  // position of the first unmasked query; none so far

  bool any() const { return first >= 0; }
  // Row of the query at `position`; -1 where it has none.
  std::int64_t row(std::int64_t position) const {
    const std::int64_t n = position - first + 1;
    return n > 0 && n % kQueryStride == 0 ? n / kQueryStride - 1 : -1;
  }
  std::int64_t position(std::int64_t row) const { return first + kQueryStride * (row + 1) - 1; }
  // Rows left by a crop to `length`.
  std::int64_t rows_below(std::int64_t length) const {
    return any() && length > first ? (length - first) / kQueryStride : 0;
  }

  // Calls take(position, row) -> Status, in order, for each sampled query among the newest `count` that sees its own
  // token (sees(position)), as long as lambda may still be learnt.
  template <class Sees, class Take>
  Status record(const Ledger& ledger, std::int64_t count, Sees sees, Take take) {
    const Policy& p = ledger.policy();
    if (!p.learns || ledger.extent().lambda == Lambda::fixed) return {};
    const std::int64_t limit = p.sinks + p.window + kPageTokens, end = ledger.extent().length;
    for (std::int64_t position = end - count; position < end; ++position) {
      if (any() && position - first >= limit) break;
      if ((any() && row(position) < 0) || !sees(position)) continue;
      if (any()) KV4_RETURN_IF_ERROR(take(position, row(position)));
      else first = position;
    }
    return {};
  }
};

}  // namespace kv4::ledger
