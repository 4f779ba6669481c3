// Which of a sequence's queries teach lambda. Energies of queries that come before the first page is due are kept by
// position until lambda is fixed, so that a crop or a repeated call leaves no trace and the size of calls does not
// matter. A sum alone could give nothing back to a crop, and energies of every query are as many bytes as fp16 keys and
// values: so one query in kQueryStride counts, from the first unmasked one on, the last of each so many: not that of a
// text's first token, which is like no other. Lambda goes with the fourth root of their mean, nearly, and near its best
// an error of it counts by its square.
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
  // Rows that a crop to `length` leaves.
  std::int64_t rows_below(std::int64_t length) const {
    return any() && length > first ? (length - first) / kQueryStride : 0;
  }

  // Asks for a record, take(position, row) -> Status, of each of the newest `count` queries that counts and sees its
  // own token, sees(position), in order, where lambda may still be learnt.
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
