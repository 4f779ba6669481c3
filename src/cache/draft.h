// A planned call: the new state of each sequence for which it does more than store rows. It is prepared in memory that
// nothing reads until commit, which cannot fail.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache/sequence.h"

namespace kv4 {

// Rows of a call's tensors that are one sequence's.
struct Part {
  std::size_t row = 0;  // of the cache
  std::int64_t tokens = 0;
  std::int32_t input = 0;           // index of axis 0
  std::int64_t input_row = 0;       // ... and of axis 2, of the first
  std::int64_t done = 0;            // of attention: queries that have been answered
  std::int64_t upto = kMostTokens;  // ... and the position below which it sees
};

// What a call appends: parts in the order of the draft's sequences, and where non-finite rows are reported if
// rows are sealed on arrival.
struct Arriving {
  const TensorView& k;
  const TensorView& v;
  std::span<const Part> parts;
  std::span<std::vector<NonFinite>> non_finite;
};

struct Change {
  Change(std::size_t index, Sequence& s) : at(index), sequence(&s), fresh(s.pool), next(s.body) {
    next.window = s.body.window.draft();
  }

  std::size_t at;  // of the call's parts
  Sequence* sequence;
  ledger::Plan plan;
  FreshPages fresh;      // plan.new_pages, then a copy of the last page where it is extended and shared
  PageId replaced = -1;  // that copy
  Body next;
  std::shared_ptr<LateNote> note;  // for the next rows, if `renoted`
  bool renoted = false;
  std::vector<std::uint8_t> skip;         // flags of sealed rows, and
  std::shared_ptr<Block> skip_on_device;  // those that kernels read
};

class Draft {
 public:
  explicit Draft(const Setup& setup, PagePool* pool) : setup_(setup), pool_(pool) {}

  bool empty() const { return changes_.empty(); }
  std::span<Change> changes() { return changes_; }
  // In ascending order of `at`.
  Change& add(std::size_t at, Sequence& s) { return changes_.emplace_back(at, s); }
  // Null where the sequence does not change.
  Change* find(std::size_t at);
  // Adds the effect of settling and of `tokens` >= 0 new rows on `s`, if it is more than storing the rows.
  void add_append(std::size_t at, Sequence& s, std::int64_t tokens, bool recording);

  // Executes the plans: everything but sealing first, then sealing of all sequences' pages in one call of the backend.
  // New rows are sealed from the call's tensors or left for the caller to store.
  Status prepare(const Arriving* arriving);
  Status seal();
  Status carry_out() {
    KV4_RETURN_IF_ERROR(prepare(nullptr));
    return seal();
  }
  void commit() noexcept;

 private:
  Status prepare(Change& c, const Arriving* arriving);
  Status learn(Change& c) const;
  Status plan_pages(Change& c, const Arriving* arriving);
  Status flag(Change& c, const Arriving* arriving) const;
  Status flag_arriving(Change& c, const Arriving& arriving) const;
  Status move_rows(Change& c) const;
  Status reopen(const Change& c, RowBuffer* rows) const;

  const Setup& setup_;
  PagePool* pool_;
  std::vector<Change> changes_;
  std::vector<SealJob> jobs_;
};

}  // namespace kv4
