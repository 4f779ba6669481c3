// Policy, once: what of one sequence is exact, sealed, due or evicted, and what a call has to do about it. It holds
// positions and page ids, and knows no memory, tensor or device.
//
// A call is planned, carried out by the owner of the memory, then committed. Planning changes nothing, so that whatever
// fails before commit leaves the sequence as it was; commit allocates nothing and cannot fail. To be carried out
// without a trace, a plan is done in this order, everything up to commit in memory that is not read yet:
//
//   lambda     learn it from the keys at plan.lambda, where that is not empty
//   seal       pages plan.sealed from the exact rows they cover, into pages with new ids
//   reopen     plan.reopened: rows of page plan.reopened_page, dequantised, for the window
//   store      new rows at plan.stored
//   commit     with the new pages' ids; plan.released may then be given back
//   keep       the rows at plan.sinks as the sinks (or before commit, where they go to memory of their own)
//   drop       exact rows that extent() no longer shows
//
// A ledger is a value: a copy is a fork, whose page ids count as one more reference each.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "format/finite.h"
#include "kv4/status.h"
#include "ledger/extent.h"

namespace kv4::ledger {

using PageId = std::int32_t;

// Whether a query has seen an exact token.
enum class Seen : std::uint8_t { unknown = 0, visible = 1, masked = 2 };

// Updates the marks of rows from `position` on, in order, by what a call saw: visible(position) of each that no query
// has seen so far.
template <class Visible>
void mark_seen(std::span<Seen> marks, std::int64_t position, Visible visible) {
  for (std::size_t j = 0; j < marks.size(); ++j)
    if (marks[j] != Seen::visible)
      marks[j] = visible(position + static_cast<std::int64_t>(j)) ? Seen::visible : Seen::masked;
}

struct Plan {
  Rows sinks;                             // exact rows that become the sinks
  Rows lambda;                            // keys that lambda is learnt from, whole pages
  std::vector<std::uint8_t> lambda_skip;  // [lambda.count()]: nonzero rows stay out
  Rows sealed;                      // positions that become pages; whole pages but where tokens are sealed on arrival
  std::int64_t first_sealed = 0;    // index of the page that holds sealed.begin
  std::vector<std::uint8_t> skip;   // [sealed.count()]: nonzero rows stay out of means and get scale 0
  std::int64_t new_pages = 0;       // ids that commit takes: all pages of `sealed` but one that is being filled already
  std::int64_t reopened_page = -1;  // index of a page that becomes window rows again
  Rows reopened;                    // positions of it that come back
  Rows unsunk;                      // exact sinks that are window rows again
  Rows erased;                      // positions that go; those behind move up
  Rows stored;                      // positions of new rows
  Rows kept;                        // entries of the page table that stay, in front of the new ones
  std::vector<PageId> released;     // references that commit gives up
  Extent after;
  std::vector<Seen> marks;     // of the window's rows as they are, where the call sees them
  std::uint64_t revision = 0;  // of the ledger that made it

  // Whether some of `sealed` goes into the last page that is held already, behind what is there.
  bool fills_last(const Extent& before) const { return !sealed.empty() && first_sealed < before.page_end(); }
};

// Which of what is held a query reads, below a position: the exact sinks, whole pages in order, exact rows.
struct View {
  Rows sinks;
  std::int64_t pages = 0;           // of the page table, from its front
  std::int64_t pages_position = 0;  // of the first one's first token
  int last_page_tokens = kPageTokens;
  Rows window;
};

// What a query at `position` reads below `upto`, of a sequence like this. stepwise: a call of at most 64 queries, each
// of which sees what one-by-one decoding would have sealed before its token came.
View view(const Policy& policy, const Extent& x, std::int64_t position, bool stepwise, std::int64_t upto);
// The first query position behind `position` whose view has other pages.
std::int64_t view_end(const Policy& policy, const Extent& x, std::int64_t position, bool stepwise);

// A call of the newest `queries` tokens below a position. Errors: out_of_range naming upto where that cuts into sealed
// tokens, of which the last query reads the most.
Status check_upto(const Policy& policy, const Extent& x, std::int64_t queries, std::int64_t upto);

class Ledger {
 public:
  explicit Ledger(const Policy& policy) : policy_(policy) { extent_.anchored = policy.arrival(); }
  // As it was saved, but for its pages, which take_pages counts. marks [extent.window_rows()] where whole
  // pages are sealed.
  Ledger(const Policy& policy, const Extent& extent, std::vector<Seen> marks)
      : policy_(policy), extent_(extent), marks_(std::move(marks)) {}
  void take_pages(std::vector<PageId> ids) noexcept {
    pages_ = std::move(ids);
    extent_.pages = static_cast<std::int64_t>(pages_.size());
  }

  const Policy& policy() const { return policy_; }
  const Extent& extent() const { return extent_; }
  std::span<const PageId> pages() const { return pages_; }  // [extent().pages]
  std::span<const Seen> marks() const { return marks_; }    // [extent().window_rows()]
  std::span<const NonFinite> non_finite() const { return non_finite_; }
  std::size_t bytes() const {
    return pages_.capacity() * sizeof(PageId) + marks_.capacity() + non_finite_.capacity() * sizeof(NonFinite);
  }

  // Seals what is due at the present length, lets go of the exact rows that a crop of the last call no longer needs,
  // and of what the sliding window hides, unless `recording`.
  void plan_settle(bool recording, Plan* plan) const;
  // The same, then `tokens` (>= 0) new rows.
  void plan_append(std::int64_t tokens, bool recording, Plan* plan) const;
  // Before attention of the newest `queries` tokens. seen [extent().window_rows()]: nonzero where some query sees the
  // row; empty: not known. A call of at most 64 queries sees what was due before its last token sealed; exact rows
  // stay.
  void plan_attend(std::int64_t queries, std::span<const std::uint8_t> seen, Plan* plan) const;
  // Keeps the first `length` positions. Errors: out_of_range below 0, beyond the length, or where the queries that
  // follow would need tokens that the sliding window evicted.
  Status plan_crop(std::int64_t length, Plan* plan) const;
  // Settles, then takes out the positions [first, first + count). Errors: out_of_range where they are not all exact and
  // behind the sinks, or where the queries that follow would need tokens that the sliding window evicted.
  Status plan_erase(std::int64_t first, std::int64_t count, bool recording, Plan* plan) const;

  // Whether settling surely does nothing, at less cost than a plan.
  bool idle(bool recording) const;
  // Whether `plan` does nothing but store new rows, or nothing at all: then extend does what commit would.
  bool only_stores(const Plan& plan) const;
  // Whether attention of so many queries may seal something; where not, mark_seen does all that plan_attend would.
  bool may_seal(std::int64_t queries) const;

  // Whether `plan` is of the ledger as it is now: nothing was committed since, and the plan was not.
  bool current(const Plan& plan) const { return plan.revision == revision_; }
  // Room for `plan`, so that commit needs none; for `rows` more rows; for `count` more notes. What they throw
  // (std::bad_alloc) changes nothing.
  void make_room(const Plan& plan);
  void make_room_for_rows(std::int64_t rows);
  void make_room_for_notes(std::size_t count) { non_finite_.reserve(non_finite_.size() + count); }
  // A current plan. ids [plan.new_pages]: one reference each is the ledger's from here on. plan.marks is used up.
  // taught: whether queries have been recorded for lambda; one that no query taught stays, since nothing could teach it
  // anew.
  void commit(Plan& plan, std::span<const PageId> ids, bool taught = true) noexcept;
  void extend(std::int64_t tokens) noexcept;
  // What attention saw of the exact rows from position `from` on: visible(position), asked in order of those that no
  // query saw yet.
  template <class Visible>
  void mark_seen(std::int64_t from, Visible visible) noexcept {
    const std::int64_t first =
        std::clamp<std::int64_t>(from - extent_.window_position, visible_, static_cast<std::int64_t>(marks_.size()));
    ledger::mark_seen(std::span(marks_).subspan(static_cast<std::size_t>(first)), extent_.window_position + first,
                      visible);
    while (visible_ < static_cast<std::int64_t>(marks_.size()) &&
           marks_[static_cast<std::size_t>(visible_)] == Seen::visible)
      ++visible_;
  }
  // The last page becomes a copy that no other sequence has, before more is sealed into it on arrival. Returns the id
  // it had.
  PageId replace_last(PageId id) noexcept;

  // Notes tokens that held NaN or infinity, in order of position.
  void note(const NonFinite& x) { non_finite_.push_back(x); }

  View view(std::int64_t position, bool stepwise, std::int64_t upto) const {
    return ledger::view(policy_, extent_, position, stepwise, upto);
  }
  std::int64_t view_end(std::int64_t position, bool stepwise) const {
    return ledger::view_end(policy_, extent_, position, stepwise);
  }
  // Pages that are sealed once n tokens are held: the window then keeps W ... W + 63.
  std::int64_t pages_due(std::int64_t n) const;

 private:
  friend class Planner;

  Policy policy_;
  Extent extent_;
  std::uint64_t revision_ = 1;
  std::vector<PageId> pages_;
  std::vector<Seen> marks_;
  std::int64_t visible_ = 0;           // marks in front that say visible; there may be more
  std::vector<NonFinite> non_finite_;  // in the window; sealed on arrival: anywhere
};

}  // namespace kv4::ledger
