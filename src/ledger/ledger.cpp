#include "ledger/ledger.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

namespace kv4::ledger {
namespace {

// Rows of a cache that never seals go in batches, so that moving the rest costs less than a copy per token.
constexpr std::int64_t kEvictedRows = kPageTokens / 2;

std::int64_t leading_masked(std::span<const Seen> marks) {
  return std::find_if(marks.begin(), marks.end(), [](Seen x) { return x != Seen::masked; }) - marks.begin();
}

std::int64_t due_from(const Policy& p, std::int64_t start, std::int64_t n) {
  return std::max<std::int64_t>(0, n - start - p.sinks - p.window) / kPageTokens;
}

// marks: of the window's rows.
std::int64_t due_at(const Policy& p, const Extent& x, std::span<const Seen> marks, std::int64_t n) {
  return due_from(p, x.anchored ? x.start : x.window_position + leading_masked(marks), n);
}

std::string positions_up_to(std::int64_t n) { return "0 to " + std::to_string(n); }

}  // namespace

// The state that a plan leads to, step by step.
class Planner {
 public:
  Planner(const Ledger& ledger, Plan* plan)
      : ledger_(ledger), p_(ledger.policy_), plan_(*plan), x_(ledger.extent_), marks_(ledger.marks_) {
    plan_ = Plan();
    plan_.revision = ledger.revision_;
  }

  void settle(bool recording) {
    recording_ = recording;
    if (p_.seals()) {
      seal_until(x_.length);
      if (x_.anchored) {
        const std::int64_t due = std::min(x_.page_end(), due_at(p_, x_, window_marks(), x_.length));
        drop_below(x_.page_position(p_, due));
        // A page that can no longer be undone has fixed lambda for good.
        if (x_.lambda == Lambda::learnt && x_.released_pages(p_) > 0) x_.lambda = Lambda::fixed;
      }
    }
    evict();
  }

  void append(std::int64_t tokens) {
    const std::int64_t end = x_.length + tokens;
    if (p_.arrival()) {
      fill_pages(tokens);
    } else {
      plan_.stored = {x_.length, end};
    }
    x_.length = end;
    if (p_.arrival()) x_.window_position = end;
  }

  void see(std::span<const std::uint8_t> seen) {
    if (seen.empty()) return;
    plan_.marks.assign(marks_.begin(), marks_.end());
    mark_seen(plan_.marks, 0, [seen](std::int64_t row) { return seen[static_cast<std::size_t>(row)] != 0; });
    marks_ = plan_.marks;
  }

  // Pages due once n tokens are held; their exact rows stay.
  void seal_until(std::int64_t n) {
    const std::int64_t due = due_at(p_, x_, window_marks(), n);
    if (due == 0 || (x_.anchored && due <= x_.page_end())) return;
    if (!x_.anchored) anchor();
    if (due <= x_.page_end()) return;
    // Lambda comes before eviction: it is that of the first page due, sealed or not.
    learn();
    if (n == x_.length) skip_hidden(due);
    const std::int64_t first = x_.page_end();
    if (due <= first) return;
    plan_.first_sealed = first;
    plan_.sealed = {x_.page_position(p_, first), x_.page_position(p_, due)};
    flag(plan_.sealed, &plan_.skip);
    plan_.new_pages = due - first;
    x_.pages += due - first;
  }

  void crop(std::int64_t n) {
    x_.length = n;
    if (p_.arrival()) {
      const std::int64_t kept = n - x_.page_position(p_, x_.first_page);
      x_.pages = (kept + kPageTokens - 1) / kPageTokens;
      x_.last_page_tokens = x_.pages == 0 ? kPageTokens : static_cast<int>(kept - (x_.pages - 1) * kPageTokens);
      x_.window_position = n;
      return;
    }
    if (!x_.anchored || n >= x_.window_position) {
      if (x_.anchored) {
        // Pages with exact rows behind them go if one-by-one decoding would not have them yet.
        const std::int64_t keep = std::clamp(due_at(p_, x_, window_marks(), n), x_.released_pages(p_), x_.page_end());
        x_.pages = keep - x_.first_page;
      }
      x_.window_position = std::min(x_.window_position, n);
    } else if (const std::int64_t body = x_.body(p_); n >= body) {
      const std::int64_t index = (n - body) / kPageTokens;
      x_.window_position = x_.page_position(p_, index);
      if (x_.window_rows() > 0) {
        plan_.reopened_page = index;
        plan_.reopened = {x_.window_position, n};
      }
      x_.pages = index - x_.first_page;
    } else {
      // Into the sinks, or before them: the sequence is no longer anchored.
      x_.window_position = std::min(x_.start, n);
      plan_.unsunk = {x_.window_position, n};
      x_.sinks = x_.pages = x_.first_page = x_.start = 0;
      x_.anchored = false;
    }
    if (x_.pages == 0 && x_.lambda == Lambda::learnt) x_.lambda = Lambda::open;
  }

  // After settle.
  Status erase(std::int64_t first, std::int64_t count) {
    const auto refused = [first](std::int64_t least, const char* why) {
      return error(StatusCode::out_of_range, "first", "at least " + std::to_string(least) + why, std::to_string(first));
    };
    if (count == 0) return {};
    if (first < x_.evicted) return refused(x_.evicted, " (older tokens left the sliding window)");
    if (x_.anchored && first < x_.start + x_.sinks)
      return refused(x_.start + x_.sinks, " (the first tokens are sinks)");
    if (first < x_.window_position) return refused(x_.window_position, " (older tokens are sealed)");
    // As after a crop, the queries that follow see tokens that came before those they would have seen.
    const std::int64_t most = x_.length - p_.sliding_window + 1 - x_.evicted;
    if (x_.evicted > 0 && count > most)
      return error(StatusCode::out_of_range, "count",
                   "at most " + std::to_string(most) + " (older tokens left the sliding window)",
                   std::to_string(count));
    plan_.erased = {first, first + count};
    x_.length -= count;
    return {};
  }

  void finish() {
    plan_.after = x_;
    const Extent& before = ledger_.extent_;
    const std::int64_t begin = std::clamp(x_.first_page, before.first_page, before.page_end());
    const std::int64_t end = std::clamp(x_.page_end() - plan_.new_pages, begin, before.page_end());
    plan_.kept = {begin - before.first_page, end - before.first_page};
    const auto at = ledger_.pages_.begin();
    plan_.released.insert(plan_.released.end(), at, at + plan_.kept.begin);
    plan_.released.insert(plan_.released.end(), at + plan_.kept.end, ledger_.pages_.end());
  }

 private:
  // Of the rows that are in the window by now; what comes or comes back has none yet.
  std::span<const Seen> window_marks() const {
    const std::int64_t gone = x_.window_position - ledger_.extent_.window_position;
    return marks_.subspan(
        static_cast<std::size_t>(std::clamp<std::int64_t>(gone, 0, static_cast<std::int64_t>(marks_.size()))));
  }
  bool masked(std::int64_t position) const {
    return marks_[static_cast<std::size_t>(position - ledger_.extent_.window_position)] == Seen::masked;
  }

  // Which window rows stay out of means: masked ones, and those that are zeros for NaN or infinity.
  void flag(const Rows& rows, std::vector<std::uint8_t>* out) const {
    out->resize(static_cast<std::size_t>(rows.count()));
    for (std::int64_t i = rows.begin; i < rows.end; ++i)
      (*out)[static_cast<std::size_t>(i - rows.begin)] = masked(i) ? 1 : 0;
    for (const NonFinite& x : ledger_.non_finite_)
      if (x.position >= rows.begin && x.position < rows.end)
        (*out)[static_cast<std::size_t>(x.position - rows.begin)] = 1;
  }

  void drop_below(std::int64_t position) {
    const std::int64_t rows = std::min(position, x_.length) - x_.window_position;
    if (rows > 0) x_.window_position += rows;
  }

  void anchor() {
    x_.start = x_.window_position + leading_masked(window_marks());
    x_.sinks = std::clamp<std::int64_t>(x_.length - x_.start, 0, p_.sinks);
    x_.anchored = true;
    x_.first_page = 0;
    plan_.sinks = {x_.start, x_.start + x_.sinks};
    drop_below(x_.start + x_.sinks);
  }

  // From all that one-by-one decoding holds when the first page is due: the keys of that page and of the window behind
  // it.
  void learn() {
    if (!p_.learns || x_.lambda != Lambda::open) return;
    const std::int64_t first = x_.page_position(p_, x_.page_end());
    const Rows keys = {first, first + (1 + p_.window / kPageTokens) * kPageTokens};
    flag(keys, &plan_.lambda_skip);
    // Pages of holes say nothing: the next one decides.
    if (std::find(plan_.lambda_skip.begin(), plan_.lambda_skip.end(), 0) == plan_.lambda_skip.end()) return;
    plan_.lambda = keys;
    x_.lambda = Lambda::learnt;
  }

  // First position that the next query may still see; 0 where nothing is hidden.
  std::int64_t needed() const { return p_.sliding_window == 0 || recording_ ? 0 : x_.length - p_.sliding_window + 1; }

  // Pages up to `due` that no query will ever see again are not worth sealing.
  void skip_hidden(std::int64_t due) {
    const std::int64_t hidden = std::min(due, (needed() - x_.body(p_)) / kPageTokens);
    if (hidden <= x_.page_end()) return;
    drop_below(x_.page_position(p_, hidden));
    x_.first_page = hidden;
    x_.pages = 0;
    if (x_.sinks == 0) x_.evicted = x_.window_position;  // evict sees to those that still have sinks
  }

  // Tokens that no later query can see are dropped: whole pages, and exact rows by pages too so that page boundaries
  // stay where they are.
  void evict() {
    const std::int64_t first = needed(), before = x_.first_held(p_);
    if (first <= before) return;
    evict_below(first);
    if (x_.first_held(p_) > before) x_.evicted = x_.first_held(p_);
  }

  void evict_below(std::int64_t first) {
    if (p_.seal == SealMode::never) {
      if (std::min(first, x_.length) - x_.window_position >= kEvictedRows) drop_below(first);
      return;
    }
    if (!x_.anchored) {
      if (first < x_.window_position + leading_masked(window_marks()) + p_.sinks + kPageTokens) return;
      anchor();
    }
    if (first >= x_.body(p_)) x_.sinks = 0;
    const std::int64_t least = p_.arrival() ? 1 : 0;  // the page that is being filled stays
    while (x_.pages > least && x_.page_position(p_, x_.first_page + 1) <= first) {
      --x_.pages;
      ++x_.first_page;
    }
    if (p_.arrival() || x_.pages > 0 || x_.window_position > x_.page_position(p_, x_.first_page)) return;
    const std::int64_t pages = (std::min(first, x_.length) - x_.window_position) / kPageTokens;
    if (pages <= 0) return;
    drop_below(x_.window_position + pages * kPageTokens);
    x_.first_page += pages;
  }

  // Sealing on arrival: the new tokens go into the last page and the pages after it.
  void fill_pages(std::int64_t tokens) {
    if (tokens == 0) return;
    const std::int64_t room = x_.pages == 0 ? 0 : kPageTokens - x_.last_page_tokens;
    plan_.sealed = {x_.length, x_.length + tokens};
    plan_.first_sealed = room > 0 ? x_.page_end() - 1 : x_.page_end();
    plan_.new_pages = (std::max<std::int64_t>(0, tokens - room) + kPageTokens - 1) / kPageTokens;
    plan_.skip.assign(static_cast<std::size_t>(tokens), 0);
    x_.pages += plan_.new_pages;
    const std::int64_t held = x_.length + tokens - x_.page_position(p_, x_.first_page);
    x_.last_page_tokens = static_cast<int>(held - (x_.pages - 1) * kPageTokens);
  }

  const Ledger& ledger_;
  const Policy& p_;
  Plan& plan_;
  Extent x_;
  std::span<const Seen> marks_;  // of the rows in the window before
  bool recording_ = false;
};

void Ledger::plan_settle(bool recording, Plan* plan) const {
  Planner planner(*this, plan);
  planner.settle(recording);
  planner.finish();
}

void Ledger::plan_append(std::int64_t tokens, bool recording, Plan* plan) const {
  Planner planner(*this, plan);
  planner.settle(recording);
  planner.append(tokens);
  planner.finish();
}

void Ledger::plan_attend(std::int64_t queries, std::span<const std::uint8_t> seen, Plan* plan) const {
  Planner planner(*this, plan);
  if (policy_.seals()) {
    planner.see(seen);
    if (queries <= kPageTokens) planner.seal_until(extent_.length - 1);
  }
  planner.finish();
}

Status Ledger::plan_crop(std::int64_t length, Plan* plan) const {
  if (length < 0 || length > extent_.length)
    return error(StatusCode::out_of_range, "length", positions_up_to(extent_.length), std::to_string(length));
  const std::int64_t needed = std::max<std::int64_t>(0, length - policy_.sliding_window + 1);
  if (length < extent_.length && extent_.evicted > needed)
    return error(StatusCode::out_of_range, "length",
                 "at least " + std::to_string(extent_.evicted + policy_.sliding_window - 1) +
                     " (older tokens left the sliding window), or 0 by reset",
                 std::to_string(length));
  Planner planner(*this, plan);
  if (length < extent_.length) planner.crop(length);
  planner.finish();
  return {};
}

Status Ledger::plan_erase(std::int64_t first, std::int64_t count, bool recording, Plan* plan) const {
  const std::int64_t length = extent_.length;
  if (first < 0 || count < 0 || first > length || count > length - first)
    return error(StatusCode::out_of_range, "first, count", "positions within " + positions_up_to(length),
                 std::to_string(first) + ", " + std::to_string(count));
  Planner planner(*this, plan);
  planner.settle(recording);
  KV4_RETURN_IF_ERROR(planner.erase(first, count));
  planner.finish();
  return {};
}

bool Ledger::idle(bool recording) const {
  const Extent& x = extent_;
  if (policy_.sliding_window > 0 && !recording && x.length - policy_.sliding_window + 1 > x.first_held(policy_))
    return false;
  if (!policy_.seals()) return true;
  const std::int64_t due = pages_due(x.length);
  if (!x.anchored) return due == 0;
  return due <= x.page_end() && x.page_position(policy_, due) <= x.window_position &&
         (x.lambda != Lambda::learnt || x.released_pages(policy_) == 0);
}

bool Ledger::only_stores(const Plan& plan) const {
  Extent stored = extent_;
  stored.length += plan.stored.count();
  return plan.after == stored && plan.marks.empty() && plan.erased.empty();
}

bool Ledger::may_seal(std::int64_t queries) const {
  if (!policy_.seals() || queries > kPageTokens) return false;
  return due_from(policy_, extent_.anchored ? extent_.start : extent_.window_position, extent_.length - 1) >
         extent_.page_end();
}

void Ledger::make_room(const Plan& plan) {
  const auto pages = static_cast<std::size_t>(extent_.pages + plan.new_pages),
             rows = static_cast<std::size_t>(plan.after.window_rows());
  if (pages > pages_.capacity()) pages_.reserve(std::max(pages, 2 * pages_.capacity()));
  if (policy_.seals()) marks_.reserve(rows);
}

void Ledger::make_room_for_rows(std::int64_t rows) {
  if (!policy_.seals()) return;
  const std::size_t need = marks_.size() + static_cast<std::size_t>(rows);
  if (need > marks_.capacity()) marks_.reserve(need + need / 8 + 8);
}

void Ledger::commit(Plan& plan, std::span<const PageId> ids, bool taught) noexcept {
  const Extent before = extent_;
  extent_ = plan.after;
  if (extent_.lambda == Lambda::learnt && !taught) extent_.lambda = Lambda::fixed;
  ++revision_;
  pages_.erase(pages_.begin() + plan.kept.end, pages_.end());
  pages_.erase(pages_.begin(), pages_.begin() + plan.kept.begin);
  pages_.insert(pages_.end(), ids.begin(), ids.end());
  visible_ = 0;
  if (policy_.seals()) {
    if (!plan.marks.empty()) marks_.assign(plan.marks.begin(), plan.marks.end());
    const std::int64_t gone = extent_.window_position - before.window_position;
    if (gone < 0) marks_.clear();  // rows from pages or sinks are all there is
    marks_.erase(marks_.begin(),
                 marks_.begin() + std::clamp<std::int64_t>(gone, 0, static_cast<std::int64_t>(marks_.size())));
    const auto erased = marks_.begin() + (plan.erased.empty() ? 0 : plan.erased.begin - extent_.window_position);
    marks_.erase(erased, erased + plan.erased.count());
    marks_.resize(static_cast<std::size_t>(extent_.window_rows()), gone < 0 ? Seen::visible : Seen::unknown);
    // After a long prefill there was room for far more rows than decoding has. Where there is no memory for less, that
    // stays.
    if (marks_.capacity() > 4 * marks_.size() + 256) marks_.shrink_to_fit();
  }
  if (non_finite_.empty()) return;
  for (NonFinite& x : non_finite_)
    if (x.position >= plan.erased.end) x.position -= plan.erased.count();
    else if (x.position >= plan.erased.begin && !plan.erased.empty()) x.position = -1;
  std::erase_if(non_finite_, [this](const NonFinite& x) {
    return x.position < 0 || x.position >= extent_.length ||
           (!policy_.arrival() && x.position < extent_.window_position);
  });
}

void Ledger::extend(std::int64_t tokens) noexcept {
  extent_.length += tokens;
  ++revision_;
  if (policy_.seals()) marks_.resize(static_cast<std::size_t>(extent_.window_rows()), Seen::unknown);
}

PageId Ledger::replace_last(PageId id) noexcept { return std::exchange(pages_.back(), id); }

std::int64_t Ledger::pages_due(std::int64_t n) const { return due_at(policy_, extent_, marks_, n); }

namespace {

// Released pages have no exact rows any more; those sealed later are read from the window.
std::int64_t visible_pages(const Policy& p, const Extent& x, std::int64_t position, bool stepwise) {
  if (p.arrival()) return x.page_end();
  const std::int64_t due = stepwise && x.anchored ? due_from(p, x.start, position) : 0;
  return std::clamp(due, x.released_pages(p), x.page_end());
}

}  // namespace

std::int64_t view_end(const Policy& p, const Extent& x, std::int64_t position, bool stepwise) {
  const std::int64_t pages = visible_pages(p, x, position, stepwise);
  if (p.arrival() || !stepwise || !x.anchored || pages == x.page_end()) return std::numeric_limits<std::int64_t>::max();
  return x.page_position(p, pages + 1) + p.window;
}

View view(const Policy& p, const Extent& x, std::int64_t position, bool stepwise, std::int64_t upto) {
  const std::int64_t pages = visible_pages(p, x, position, stepwise);
  View view;
  view.sinks = {x.start, std::clamp(upto, x.start, x.start + x.sinks)};
  view.pages = pages - x.first_page;
  view.pages_position = x.page_position(p, x.first_page);
  if (pages == x.page_end()) view.last_page_tokens = x.last_page_tokens;
  const std::int64_t first = x.pages == 0 ? x.window_position : std::max(x.window_position, x.page_position(p, pages));
  view.window = {first, std::max(first, std::min(upto, x.length))};
  if (p.arrival()) view.window = {x.length, x.length};
  return view;
}

Status check_upto(const Policy& p, const Extent& x, std::int64_t queries, std::int64_t upto) {
  const View v = view(p, x, x.length - 1, queries <= kPageTokens, upto);
  const std::int64_t sealed = v.pages_position + (v.pages - 1) * kPageTokens + v.last_page_tokens;
  return v.pages == 0 || upto >= sealed
             ? Status()
             : error(StatusCode::out_of_range, "upto",
                     "at least " + std::to_string(sealed) + ", the end of the sealed tokens", std::to_string(upto));
}

}  // namespace kv4::ledger
