// kv4._core.Ledger: the policy of one sequence, for hosts whose arrays Python holds.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>

#include "attention/visibility.h"
#include "ledger/ledger.h"

namespace kv4::python {

// Visibility for one sequence's queries of a call, with the tensors it refers to.
struct Sight {
  using Seen = nanobind::ndarray<const bool, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

  Sight(std::int64_t tokens, std::int64_t at, std::int64_t first, std::int64_t count)
      : input(at), row(first), queries(count), length(tokens) {}
  Sight(const Sight&) = delete;  // its parts point to each other

  AttendArgs args;
  std::int64_t input, row, queries, length;
  std::int32_t start = 0, window = 0;
  std::optional<Seen> general;
  std::optional<Visibility> visibility;

  std::int64_t first_query() const { return length - queries; }
  std::int64_t first_seen() const { return args.mask.start == nullptr ? 0 : args.mask.offset + start; }
};

void bind_ledger(nanobind::module_& m);

}  // namespace kv4::python
