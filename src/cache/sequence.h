// One sequence of a layer's cache, and the arithmetic of positions.
//
//   [ dropped padding: start ][ sinks: S ][ page 0 ][ page 1 ] ... [ window ]
//
// Page i covers positions body() + 64 i ... + 63, body() = start + S. Until the sequence is
// anchored (at its first seal or eviction) every token is in the window and start is not known.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cache/block.h"
#include "cache/page_list.h"
#include "cache/rows.h"
#include "kv4/recipe.h"

namespace kv4 {

// What attention has told about an exact token.
enum class Seen : std::uint8_t { unknown = 0, visible = 1, masked = 2 };

// Energies of queries that come before the first page is due, kept by position until lambda is fixed, so that a crop or a
// repeated call leaves no trace and the size of calls does not matter. A sum alone could give nothing back to a crop, and
// energies of every query are as many bytes as fp16 keys and values: so one query in kEvery counts, from the first unmasked
// one on, the last of each kEvery: not that of a text's first token, which is like no other. Lambda goes with the fourth root
// of their mean, nearly, and near its best an error of it counts by its square. Blocks are written once and then shared by
// forks.
struct QueryEnergy {
  static constexpr std::int64_t kEvery = kQueryStride;
  std::int64_t first = -1;                    // position of the first unmasked query; none so far
  std::vector<std::shared_ptr<Block>> rows;   // float [kv_heads * head_dim_k], of the query at first + kEvery * i + kEvery - 1; null: masked or not asked

  bool any() const { return first >= 0; }
  // Row of the query at `position`; -1 where it has none.
  std::int64_t row(std::int64_t position) const {
    const std::int64_t n = position - first + 1;
    return n > 0 && n % kEvery == 0 ? n / kEvery - 1 : -1;
  }
  void crop(std::int64_t length) {
    if (length <= first) *this = QueryEnergy();
    const auto kept = static_cast<std::size_t>(any() ? (length - first) / kEvery : 0);
    if (rows.size() > kept) rows.resize(kept);
  }
};

// A note that a backend writes to when it gets there, and what of it is in non_finite already. `end`: news of positions from
// there on are not this sequence's, but of a fork or of what a crop took away.
struct Told {
  std::shared_ptr<LateNote> note;
  std::int64_t key = 0, value = 0;
  std::int64_t end = std::numeric_limits<std::int64_t>::max();
};

struct Sequence {
  std::int64_t length = 0;
  std::int64_t start = 0;
  bool anchored = false;
  int sink_limit = 0;                     // S of the recipe

  RowBuffer sinks;
  std::int64_t first_page = 0;            // index of pages.front(): earlier ones are evicted
  PageList pages;
  int last_page_tokens = kPageTokens;     // arrival mode fills the last page token by token

  RowBuffer window;
  std::int64_t window_position = 0;       // of window row 0
  std::vector<Seen> seen;                 // per window row
  std::vector<NonFinite> non_finite;      // window only (arrival: everywhere)
  std::vector<Told> notes;                // the last is written to; none where the backend tells at once
  bool note_forked = false;               // a fork has the last one too: the next rows need a note of their own

  std::int64_t evicted = 0;               // a sliding window let go of every position below
  QueryEnergy query_energy;
  std::shared_ptr<Block> lambda;          // float [kv_heads, head_dim_k]

  // Where news of the next rows go; null where the backend tells at once.
  LateNote* note() const {
    return notes.empty() || notes.back().end != Told().end ? nullptr : notes.back().note.get();
  }
  std::int64_t body() const { return start + sink_limit; }
  std::int64_t page_position(std::int64_t index) const { return body() + index * kPageTokens; }
  std::int64_t page_end() const { return first_page + static_cast<std::int64_t>(pages.size()); }
  // Position behind the last sealed token.
  std::int64_t sealed_end() const {
    return page_position(page_end()) - (pages.empty() ? 0 : kPageTokens - last_page_tokens);
  }
  std::int64_t sealed_tokens() const {
    return pages.empty() ? 0 : static_cast<std::int64_t>(pages.size() - 1) * kPageTokens + last_page_tokens;
  }
  // First position that has not been dropped as padding (known or presumed).
  std::int64_t leading_masked() const {
    std::int64_t n = 0;
    while (n < static_cast<std::int64_t>(seen.size()) && seen[n] == Seen::masked) ++n;
    return n;
  }
  std::int64_t presumed_start() const { return anchored ? start : window_position + leading_masked(); }
  // Pages that are sealed once `n` tokens are held: the window then keeps window ... window+63.
  std::int64_t pages_due(std::int64_t n, int window_tokens) const {
    return std::max<std::int64_t>(0, n - presumed_start() - sink_limit - window_tokens) / kPageTokens;
  }
  // Pages whose exact rows are gone.
  std::int64_t released_pages() const {
    if (!anchored || pages.empty()) return first_page;
    return std::clamp<std::int64_t>((window_position - body()) / kPageTokens, first_page, page_end());
  }
  // Smallest position still held.
  std::int64_t first_held() const {
    if (sinks.count() > 0) return start;
    if (!pages.empty()) return page_position(first_page);
    return window_position;
  }

  // A copy that takes this one's place, or is given up.
  Sequence draft() const {
    Sequence next = *this;
    next.window = window.draft();
    return next;
  }
  // A copy of it goes on as well.
  void fork() {
    pages.fork();
    note_forked = true;
  }

  // Drops the first `rows` rows of the window.
  void drop_window_front(std::int64_t rows) {
    if (rows <= 0) return;
    window.drop_front(rows);
    window_position += rows;
    seen.erase(seen.begin(), seen.begin() + rows);
    std::erase_if(non_finite, [this](const NonFinite& x) { return x.position < window_position; });
  }
};

// The sequences of a cache as a call leaves them if it succeeds. What it does to them, and what backends write for it, shows
// in nothing that the cache holds until commit, which cannot fail.
class Draft {
 public:
  explicit Draft(std::vector<Sequence>& held) : held_(held) {}
  Draft(const Draft&) = delete;
  Draft& operator=(const Draft&) = delete;
  ~Draft() {
    // A device may have seen the pages of one that is given up.
    if (made_)
      for (Sequence& s : held_) s.pages.renew();
  }

  bool made() const { return made_; }
  // From copies of the sequences held; without, calls change what is held in place.
  void make() {
    std::vector<Sequence> next;
    next.reserve(held_.size());
    for (const Sequence& s : held_) next.push_back(s.draft());
    make(std::move(next));
  }
  void make(std::vector<Sequence> next) {
    next_ = std::move(next);
    made_ = true;
  }
  std::vector<Sequence>& sequences() { return made_ ? next_ : held_; }
  void commit() noexcept {
    if (!made_) return;
    held_.swap(next_);
    next_.clear();
    for (Sequence& s : held_) s.window.settle();
    made_ = false;
  }

 private:
  std::vector<Sequence>& held_;
  std::vector<Sequence> next_;
  bool made_ = false;
};

}  // namespace kv4
