// All that what follows may depend on, as it is. Nothing is sealed or dropped for it, so that a loaded cache can do
// what this one can, cropping into the last call's tokens included.
#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "blob/contents.h"

namespace kv4::blob {
namespace {

class Writing {
 public:
  Writing(const Format& format, const SaveSource& from, const Sink& sink) : format_(format), from_(from), out_(sink) {}

  Status run(std::size_t batch, bool recording) {
    std::int64_t longest = 0;
    for (std::size_t b = 0; b < batch; ++b) longest = std::max(longest, length(b));
    std::vector<std::uint64_t> lengths;
    bool ragged = false;
    for (std::size_t b = 0; b < batch; ++b) {
      lengths.push_back(static_cast<std::uint64_t>(length(b)));
      ragged = ragged || length(b) < longest;
      number_pages(b);
    }
    std::vector<std::uint64_t> numbers;
    numbers.reserve(format_.fields.size());
    for (const Field& field : format_.fields) numbers.push_back(field.value);
    // The earliest that can say it.
    std::uint32_t version = ragged ? kRagged : kVersion;
    for (const std::uint32_t later : {kWidths, kRefined}) {
      const std::size_t left_out = unsaid(later - 1);
      if (!std::equal(kUnsaid.end() - left_out, kUnsaid.end(), numbers.end() - static_cast<std::ptrdiff_t>(left_out)))
        version = later;
    }
    numbers.resize(numbers.size() - unsaid(version));
    KV4_RETURN_IF_ERROR(out_.begin(version));
    KV4_RETURN_IF_ERROR(out_.write(Kind::config, std::as_bytes(std::span(numbers))));
    const State saved{batch, static_cast<std::uint64_t>(longest), pages_.size(), recording ? 1u : 0u};
    KV4_RETURN_IF_ERROR(out_.write(Kind::state, bytes_of(saved)));
    if (version >= kRagged) KV4_RETURN_IF_ERROR(array(Kind::lengths, lengths));
    for (std::size_t b = 0; b < batch; ++b) KV4_RETURN_IF_ERROR(sequence(b));
    std::vector<std::byte> block(format_.page_bytes());
    for (const ledger::PageId page : pages_) {
      KV4_RETURN_IF_ERROR(from_.page(page, block));
      KV4_RETURN_IF_ERROR(out_.write(Kind::page, block));
    }
    return notes(batch);
  }

 private:
  std::int64_t length(std::size_t b) const { return from_.ledger(b).extent().length; }
  template <class T>
  Status array(Kind kind, const std::vector<T>& x) {
    return out_.write_array(kind, std::span<const T>(x));
  }

  // As the tables first name them; forks share them in the file too.
  void number_pages(std::size_t b) {
    std::vector<std::uint64_t>& table = tables_.emplace_back();
    for (const ledger::PageId id : from_.ledger(b).pages()) {
      const auto [at, fresh] = known_.try_emplace(id, pages_.size());
      if (fresh) pages_.push_back(id);
      table.push_back(at->second);
    }
  }

  Status sequence(std::size_t b) {
    const ledger::Ledger& held = from_.ledger(b);
    const ledger::Extent& x = held.extent();
    Learnt learnt;
    KV4_RETURN_IF_ERROR(from_.learnt(b, &learnt));
    const bool recorded = learnt.queries.any();
    const Sequence saved{x.start,
                         x.anchored ? 1 : 0,
                         x.first_page,
                         x.pages,
                         x.last_page_tokens,
                         x.sinks,
                         x.window_rows(),
                         format_.policy.arrival() ? 0 : x.window_position,
                         x.evicted,
                         learnt.lambda.empty() ? 0 : 1,
                         recorded ? 1 : 0,
                         recorded ? learnt.queries.first : 0};
    KV4_RETURN_IF_ERROR(out_.write(Kind::sequence, bytes_of(saved)));
    KV4_RETURN_IF_ERROR(array(Kind::table, tables_[b]));
    KV4_RETURN_IF_ERROR(rows(b, true, x.sinks));
    KV4_RETURN_IF_ERROR(rows(b, false, x.window_rows()));
    std::vector<ledger::Seen> marks(held.marks().begin(), held.marks().end());
    marks.resize(static_cast<std::size_t>(x.window_rows()));  // a recipe that seals no pages has none
    KV4_RETURN_IF_ERROR(array(Kind::seen, marks));
    KV4_RETURN_IF_ERROR(array(Kind::lambda, learnt.lambda));
    if (!recorded) return {};
    std::vector<std::uint8_t> filled(format_.queries / ledger::kQueryStride);
    for (std::size_t i = 0; i < learnt.energies.size(); ++i) filled[i] = learnt.energies[i].empty() ? 0 : 1;
    KV4_RETURN_IF_ERROR(array(Kind::filled, filled));
    for (std::vector<float>& row : learnt.energies) {
      if (row.empty()) continue;
      for (float& value : row) value = std::isfinite(value) ? value : 0.0f;  // as it counts
      KV4_RETURN_IF_ERROR(out_.write(Kind::energies, std::as_bytes(std::span(row))));
    }
    return {};
  }

  Status rows(std::size_t b, bool sinks, std::int64_t count) {
    std::vector<std::byte> block;
    for (std::int64_t first = 0; first < count; first += kPageTokens) {
      const std::int64_t tokens = std::min<std::int64_t>(kPageTokens, count - first);
      block.resize(format_.rows_bytes(tokens));
      KV4_RETURN_IF_ERROR(from_.rows(b, sinks, first, tokens, block));
      KV4_RETURN_IF_ERROR(out_.write(Kind::rows, block));
    }
    return {};
  }

  Status notes(std::size_t batch) {
    std::vector<std::vector<std::uint64_t>> rows;
    std::vector<std::uint64_t> counts;
    for (std::size_t b = 0; b < batch; ++b) {
      const std::span<const NonFinite> known = from_.ledger(b).non_finite();
      std::vector<NonFinite> found(known.begin(), known.end());
      from_.pending_non_finite(b, &found);
      counts.push_back(found.size());
      rows.emplace_back();
      for (const NonFinite& x : found)
        rows.back().push_back(static_cast<std::uint64_t>(x.position) << 2 | (x.value ? 2u : 0u) | (x.key ? 1u : 0u));
    }
    KV4_RETURN_IF_ERROR(array(Kind::non_finite_counts, counts));
    for (const std::vector<std::uint64_t>& each : rows) KV4_RETURN_IF_ERROR(array(Kind::non_finite, each));
    return {};
  }

  const Format& format_;
  const SaveSource& from_;
  Writer out_;
  std::unordered_map<ledger::PageId, std::uint64_t> known_;
  std::vector<ledger::PageId> pages_;
  std::vector<std::vector<std::uint64_t>> tables_;
};

}  // namespace

Status write(const Format& format, std::size_t batch, bool recording, const SaveSource& from, const Sink& sink) {
  return Writing(format, from, sink).run(batch, recording);
}

}  // namespace kv4::blob
