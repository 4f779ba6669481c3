// Reading a file: nothing is allocated for a count alone, and nothing is given out that no cache could have left.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "blob/contents.h"

namespace kv4::blob {
namespace {

Status expect_equal(const char* name, std::int64_t value, std::int64_t wanted) {
  return expect_within(name, value, wanted, wanted);
}

// `tokens`: its length.
Status check(const ledger::Policy& policy, const Sequence& s, std::int64_t tokens) {
  const bool seals = policy.seal != SealMode::never, learns = policy.learns;
  const std::int64_t pages_at_most = seals ? tokens / kPageTokens + 1 : 0;
  const std::int64_t sinks = policy.sinks;
  KV4_RETURN_IF_ERROR(expect_within("start", s.start, 0, tokens));
  KV4_RETURN_IF_ERROR(expect_within("anchored", s.anchored, 0, 1));
  KV4_RETURN_IF_ERROR(expect_within("first_page", s.first_page, 0, pages_at_most));
  KV4_RETURN_IF_ERROR(expect_within("pages", s.pages, 0, pages_at_most));
  KV4_RETURN_IF_ERROR(expect_within("last_page_tokens", s.last_page_tokens, 1, kPageTokens));
  KV4_RETURN_IF_ERROR(expect_within("window_position", s.window_position, 0, tokens));
  KV4_RETURN_IF_ERROR(expect_within("evicted", s.evicted, 0, policy.sliding_window > 0 ? tokens : 0));
  KV4_RETURN_IF_ERROR(expect_within("lambda", s.lambda, 0, learns ? 1 : 0));
  KV4_RETURN_IF_ERROR(expect_within("energies", s.energies, 0, learns ? 1 : 0));
  KV4_RETURN_IF_ERROR(expect_within("energy_position", s.energy_position, 0, s.energies != 0 ? tokens : 0));
  if (s.sinks != 0) KV4_RETURN_IF_ERROR(expect_equal("sinks", s.sinks, s.anchored != 0 ? sinks : 0));

  if (policy.arrival()) {  // every token is in a page, the first of them at position 0
    KV4_RETURN_IF_ERROR(expect_equal("anchored", s.anchored, 1));
    KV4_RETURN_IF_ERROR(expect_equal("start", s.start, 0));
    KV4_RETURN_IF_ERROR(expect_equal("window_position", s.window_position, 0));
    KV4_RETURN_IF_ERROR(expect_equal("window", s.window, 0));
    const std::int64_t open = s.pages == 0 ? 0 : kPageTokens - s.last_page_tokens;
    if (s.pages == 0) KV4_RETURN_IF_ERROR(expect_equal("last_page_tokens", s.last_page_tokens, kPageTokens));
    KV4_RETURN_IF_ERROR(expect_equal("tokens in pages", (s.first_page + s.pages) * kPageTokens - open, tokens));
    return expect_within("evicted", s.evicted, s.first_page * kPageTokens, tokens);
  }
  KV4_RETURN_IF_ERROR(expect_equal("last_page_tokens", s.last_page_tokens, kPageTokens));
  KV4_RETURN_IF_ERROR(expect_equal("window", s.window, tokens - s.window_position));
  if (s.anchored == 0) {  // every token is in the window
    KV4_RETURN_IF_ERROR(expect_equal("start", s.start, 0));
    KV4_RETURN_IF_ERROR(expect_equal("first_page", s.first_page, 0));
    KV4_RETURN_IF_ERROR(expect_equal("pages", s.pages, 0));
    return seals ? Status() : expect_within("evicted", s.evicted, s.window_position, tokens);
  }
  KV4_RETURN_IF_ERROR(expect_within("anchored", s.anchored, 0, seals ? 1 : 0));
  // Exact rows begin with a page that is held or is sealed next.
  const std::int64_t body = s.start + sinks, first = body + s.first_page * kPageTokens,
                     end = first + s.pages * kPageTokens;
  KV4_RETURN_IF_ERROR(expect_within("pages", s.pages, 0, tokens < first ? -1 : (tokens - first) / kPageTokens));
  KV4_RETURN_IF_ERROR(expect_within("window_position", s.window_position, first, end));
  KV4_RETURN_IF_ERROR(expect_equal("rest of window_position by pages", (s.window_position - body) % kPageTokens, 0));
  // A crop asks `evicted` whether what it needs is there.
  const std::int64_t gone = s.first_page > 0 ? first : s.sinks < sinks ? body : 0;
  return expect_within("evicted", s.evicted, gone, tokens);
}

class Reading {
 public:
  Reading(const Format& format, const Source& source, LoadTarget& to, Contents& out)
      : format_(format), in_(source), to_(to), out_(out) {}

  Status run() {
    KV4_RETURN_IF_ERROR(in_.begin());
    std::vector<std::uint64_t> theirs(format_.fields.size());
    std::copy(kUnsaid.begin(), kUnsaid.end(), theirs.end() - kUnsaid.size());
    const std::size_t said = theirs.size() - unsaid(in_.version());
    KV4_RETURN_IF_ERROR(in_.read(Kind::config, std::as_writable_bytes(std::span(theirs).first(said))));
    KV4_RETURN_IF_ERROR(expect_same(format_.fields, theirs));
    State saved{};
    KV4_RETURN_IF_ERROR(in_.read(Kind::state, std::as_writable_bytes(std::span(&saved, 1))));
    const auto batch = static_cast<std::int64_t>(saved.batch), longest = static_cast<std::int64_t>(saved.length);
    constexpr std::int64_t kMost = std::numeric_limits<int>::max();
    KV4_RETURN_IF_ERROR(expect_within("batch", batch, 0, kMost));
    KV4_RETURN_IF_ERROR(expect_within("length", longest, 0, batch > 0 ? kMostTokens : 0));
    KV4_RETURN_IF_ERROR(expect_within("recording", static_cast<std::int64_t>(saved.recording), 0, 1));
    KV4_RETURN_IF_ERROR(lengths(saved));
    for (std::size_t b = 0; b < saved.batch; ++b)
      KV4_RETURN_IF_ERROR(sequence(b, lengths_.empty() ? longest : static_cast<std::int64_t>(lengths_[b])));
    KV4_RETURN_IF_ERROR(expect_equal("pages", static_cast<std::int64_t>(saved.pages), named_));
    for (std::int64_t i = 0; i < named_; ++i) KV4_RETURN_IF_ERROR(page(i));
    out_.recording = saved.recording != 0;
    return notes();
  }

 private:
  Status lengths(const State& saved) {
    if (in_.version() < kRagged) return {};
    KV4_RETURN_IF_ERROR(in_.read_array(Kind::lengths, saved.batch, &lengths_));
    for (const std::uint64_t length : lengths_)
      KV4_RETURN_IF_ERROR(
          expect_within("length", static_cast<std::int64_t>(length), 0, static_cast<std::int64_t>(saved.length)));
    const std::int64_t longest =
        saved.batch == 0 ? 0 : static_cast<std::int64_t>(*std::max_element(lengths_.begin(), lengths_.end()));
    return expect_equal("longest", longest, static_cast<std::int64_t>(saved.length));
  }

  // One sequence but for its pages and its notes. `tokens`: its length.
  Status sequence(std::size_t b, std::int64_t tokens) {
    const ledger::Policy& policy = format_.policy;
    Sequence saved{};
    KV4_RETURN_IF_ERROR(in_.read(Kind::sequence, std::as_writable_bytes(std::span(&saved, 1))));
    KV4_RETURN_IF_ERROR(check(policy, saved, tokens));
    ledger::Extent x;
    x.length = tokens;
    x.start = saved.start;
    x.anchored = saved.anchored != 0;
    x.lambda = saved.lambda == 0     ? ledger::Lambda::open
               : saved.energies != 0 ? ledger::Lambda::learnt
                                     : ledger::Lambda::fixed;
    x.sinks = saved.sinks;
    x.first_page = saved.first_page;
    x.last_page_tokens = static_cast<int>(saved.last_page_tokens);
    x.window_position = policy.arrival() ? tokens : saved.window_position;
    x.evicted = saved.evicted;
    std::vector<ledger::PageId> pages;
    KV4_RETURN_IF_ERROR(table(saved.pages, &pages));
    KV4_RETURN_IF_ERROR(rows(b, true, saved.sinks));
    KV4_RETURN_IF_ERROR(rows(b, false, saved.window));
    std::vector<ledger::Seen> marks;
    KV4_RETURN_IF_ERROR(in_.read_array(Kind::seen, static_cast<std::uint64_t>(saved.window), &marks));
    for (const ledger::Seen seen : marks)
      KV4_RETURN_IF_ERROR(expect_within("record of masks", static_cast<std::int64_t>(seen), 0, 2));
    if (!policy.seals()) marks.clear();
    Learnt learnt;
    if (saved.lambda != 0) {
      KV4_RETURN_IF_ERROR(in_.read_array(Kind::lambda, format_.channels(), &learnt.lambda));
      for (const float value : learnt.lambda)
        if (!(value > 0) || !std::isfinite(value))
          return error(StatusCode::data_loss, "saved lambda", "positive finite values", std::to_string(value));
    }
    if (saved.energies != 0) KV4_RETURN_IF_ERROR(queries(saved.energy_position, &learnt));
    Contents::Sequence& made =
        out_.sequences.emplace_back(Contents::Sequence{{policy, x, std::move(marks)}, std::move(learnt)});
    made.ledger.take_pages(std::move(pages));
    return {};
  }

  // Each page is first named in order.
  Status table(std::int64_t count, std::vector<ledger::PageId>* pages) {
    std::vector<std::uint64_t> numbers;
    KV4_RETURN_IF_ERROR(in_.read_array(Kind::table, static_cast<std::uint64_t>(count), &numbers));
    constexpr std::int64_t kMost = std::numeric_limits<ledger::PageId>::max() - 1;
    for (const std::uint64_t number : numbers) {
      KV4_RETURN_IF_ERROR(expect_within("page table", static_cast<std::int64_t>(number), 0, std::min(named_, kMost)));
      pages->push_back(static_cast<ledger::PageId>(number));
      if (pages->back() == named_) ++named_;
    }
    return {};
  }

  Status rows(std::size_t b, bool sinks, std::int64_t count) {
    std::vector<std::byte> block;
    for (std::int64_t first = 0; first < count; first += kPageTokens) {
      const std::int64_t tokens = std::min<std::int64_t>(kPageTokens, count - first);
      block.resize(format_.rows_bytes(tokens));
      KV4_RETURN_IF_ERROR(in_.read(Kind::rows, block));
      if (!finite(block.data(), format_.dtype, static_cast<int>(block.size() / size_of(format_.dtype))))
        return error(StatusCode::data_loss, "saved exact rows", "finite values", "NaN or infinity");
      KV4_RETURN_IF_ERROR(to_.rows(b, sinks, first, tokens, count, block));
    }
    return {};
  }

  Status queries(std::int64_t first, Learnt* learnt) {
    const bool every = in_.version() == 1;  // has a record of every query
    constexpr auto kStride = static_cast<std::size_t>(ledger::kQueryStride);
    std::vector<std::uint8_t> filled;
    KV4_RETURN_IF_ERROR(in_.read_array(Kind::filled, every ? format_.queries : format_.queries / kStride, &filled));
    for (const std::uint8_t each : filled) KV4_RETURN_IF_ERROR(expect_within("record of queries", each, 0, 1));
    learnt->queries.first = first;
    std::vector<float> values(format_.channels());
    for (std::size_t i = 0; i < filled.size(); ++i) {
      if (filled[i] == 0) continue;
      KV4_RETURN_IF_ERROR(in_.read(Kind::energies, std::as_writable_bytes(std::span(values))));
      for (const float x : values)
        if (!(x >= 0) || !std::isfinite(x))
          return error(StatusCode::data_loss, "saved query energies", "finite values that are not negative",
                       std::to_string(x));
      if (every && i % kStride != kStride - 1) continue;  // counts no more
      const std::size_t row = every ? i / kStride : i;
      learnt->energies.resize(row + 1);
      learnt->energies[row] = values;
    }
    return {};
  }

  Status page(std::int64_t number) {
    std::vector<std::byte> block(format_.page_bytes());
    KV4_RETURN_IF_ERROR(in_.read(Kind::page, block));
    const kv4_page_layout& l = format_.slice;
    for (int h = 0; h < format_.kv_heads; ++h) {
      const auto* got = block.data() + static_cast<std::size_t>(h) * l.head_bytes;
      const bool ok = finite(got + l.k_scales, DType::f16, static_cast<int>(key_scale_bytes(l) / 2)) &&
                      finite(got + l.v_scales, DType::f16, static_cast<int>(value_scale_bytes(l) / 2));
      if (!ok) return error(StatusCode::data_loss, "saved page", "finite scales and means", "NaN or infinity");
      KV4_RETURN_IF_ERROR(positive(got + l.k_scales, l.groups_k * kPageTokens));
      KV4_RETURN_IF_ERROR(positive(got + l.v_scales, l.groups_v * kPageTokens));
      KV4_RETURN_IF_ERROR(second_rows(got));
    }
    return to_.page(number, named_, block);
  }

  // Of finite fp16 scales: sealing leaves none below 0, and the sums of integer kernels are bounded by that.
  static Status positive(const std::byte* scales, std::uint32_t count) {
    const auto* bits = reinterpret_cast<const std::uint16_t*>(scales);
    if (std::any_of(bits, bits + count, [](std::uint16_t x) { return x > 0x8000u; }))
      return error(StatusCode::data_loss, "saved page", "scales of 0 or more", "one below 0");
    return {};
  }

  // Of a head's slice: kernels index tokens by their places.
  Status second_rows(const std::byte* slice) const {
    const kv4_second_layout& at = format_.slice.second;
    if (!finite(slice + at.scales, DType::f16, static_cast<int>(at.rows * format_.slice.groups_k)))
      return error(StatusCode::data_loss, "saved page", "finite second scales", "NaN or infinity");
    KV4_RETURN_IF_ERROR(positive(slice + at.scales, at.rows * format_.slice.groups_k));
    for (std::uint32_t row = 0; row < at.rows; ++row)
      KV4_RETURN_IF_ERROR(
          expect_within("place of a second row", std::to_integer<int>(slice[at.places + row]), 0, kPageTokens - 1));
    return {};
  }

  Status notes() {
    std::vector<std::uint64_t> counts, found;
    KV4_RETURN_IF_ERROR(in_.read_array(Kind::non_finite_counts, out_.sequences.size(), &counts));
    for (std::size_t b = 0; b < counts.size(); ++b) {
      ledger::Ledger& held = out_.sequences[b].ledger;
      KV4_RETURN_IF_ERROR(in_.read_array(Kind::non_finite, counts[b], &found));
      for (const std::uint64_t x : found) {
        KV4_RETURN_IF_ERROR(
            expect_within("non-finite row", static_cast<std::int64_t>(x >> 2), 0, held.extent().length - 1));
        held.note({static_cast<std::int64_t>(x >> 2), (x & 1u) != 0, (x & 2u) != 0});
      }
    }
    return {};
  }

  const Format& format_;
  Reader in_;
  LoadTarget& to_;
  Contents& out_;
  std::vector<std::uint64_t> lengths_;  // where they differ
  std::int64_t named_ = 0;              // pages
};

}  // namespace

Status read(const Format& format, const Source& source, LoadTarget& to, Contents* out) {
  *out = Contents();
  return Reading(format, source, to, *out).run();
}

}  // namespace kv4::blob
