// A host with memory made of token names, driven by a ledger's plans, and what the sequence really is: a list of
// tokens.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <vector>

#include "ledger/ledger.h"

namespace kv4::ledger {

// The name of every token ever appended; equal names are equal tokens.
using Token = std::int64_t;
inline constexpr Token kGone = -1;

// Pages with reference counts, as a host has them.
class Pages {
 public:
  PageId take() {
    PageId id;
    if (free_.empty()) {
      id = static_cast<PageId>(content_.size());
      content_.emplace_back();
      references_.push_back(0);
    } else {
      id = free_.back();
      free_.pop_back();
    }
    content_[at(id)].fill(kGone);
    references_[at(id)] = 1;
    return id;
  }
  void retain(PageId id) { ++references_[at(id)]; }
  void release(PageId id) {
    ASSERT_GT(references_[at(id)], 0) << "page " << id << " is given back twice";
    if (--references_[at(id)] == 0) free_.push_back(id);
  }
  int references(PageId id) const { return references_[at(id)]; }
  std::array<Token, kPageTokens>& operator[](PageId id) { return content_[at(id)]; }
  std::size_t held() const { return content_.size() - free_.size(); }

 private:
  static std::size_t at(PageId id) { return static_cast<std::size_t>(id); }
  std::vector<std::array<Token, kPageTokens>> content_;
  std::vector<int> references_;
  std::vector<PageId> free_;
};

class Model {
 public:
  Model(const Policy& policy, Pages* pages) : ledger_(policy), pages_(pages) {}
  Model(const Model& o)
      : ledger_(o.ledger_), pages_(o.pages_), tokens_(o.tokens_), hidden_(o.hidden_), rows_(o.rows_),
        recording_(o.recording_) {
    for (const PageId id : ledger_.pages()) pages_->retain(id);
  }
  Model& operator=(const Model&) = delete;
  ~Model() {
    for (const PageId id : ledger_.pages()) pages_->release(id);
  }

  const Ledger& ledger() const { return ledger_; }
  std::int64_t length() const { return static_cast<std::int64_t>(tokens_.size()); }
  const std::vector<bool>& hidden() const { return hidden_; }
  void record_past(bool on) { recording_ = on; }

  void append(std::int64_t count, Token name, bool hidden) {
    ledger_.plan_append(count, recording_, &plan_);
    if (ledger_.only_stores(plan_)) check_extend(count);
    Plan settled;
    ledger_.plan_settle(recording_, &settled);
    if (ledger_.idle(recording_)) {
      ASSERT_EQ(settled.after, ledger_.extent()) << "there was something to do";
    } else if (ledger_.policy().sliding_window == 0) {
      ASSERT_FALSE(settled.after == ledger_.extent()) << "there was nothing to do";
    }
    for (std::int64_t i = 0; i < count; ++i) {
      tokens_.push_back(name + i);
      hidden_.push_back(hidden);
    }
    carry_out();
  }
  // The newest `queries` tokens attend; masks hide what was appended hidden. Queries of hidden tokens see nothing.
  void attend(std::int64_t queries) {
    const Extent& x = ledger_.extent();
    std::vector<std::uint8_t> seen(ledger_.marks().size());
    const std::int64_t first_query = length() - queries;
    const std::int64_t window = ledger_.policy().sliding_window;
    for (std::size_t j = 0; j < seen.size(); ++j) {
      const std::int64_t position = x.window_position + static_cast<std::int64_t>(j);
      // Of the queries from the token's own on, the first has the widest view of it.
      const std::int64_t query = std::max(first_query, position);
      seen[j] = !hidden_[static_cast<std::size_t>(position)] && (window == 0 || position > query - window);
    }
    ledger_.plan_attend(queries, seen, &plan_);
    if (!ledger_.may_seal(queries)) check_tell(seen);
    carry_out();
    check_views(queries);
  }
  // False where the range is not all exact and behind the sinks.
  bool erase(std::int64_t first, std::int64_t count) {
    if (const Status status = ledger_.plan_erase(first, count, recording_, &plan_); !status.ok()) {
      EXPECT_EQ(status.code(), StatusCode::out_of_range);
      return false;
    }
    tokens_.erase(tokens_.begin() + first, tokens_.begin() + first + count);
    hidden_.erase(hidden_.begin() + first, hidden_.begin() + first + count);
    carry_out();
    return true;
  }
  void settle() {
    ledger_.plan_settle(recording_, &plan_);
    carry_out();
  }
  // False where the sliding window has evicted what would be needed.
  bool crop(std::int64_t n) {
    if (const Status status = ledger_.plan_crop(n, &plan_); !status.ok()) {
      EXPECT_EQ(status.code(), StatusCode::out_of_range);
      return false;
    }
    tokens_.resize(static_cast<std::size_t>(n));
    hidden_.resize(static_cast<std::size_t>(n));
    carry_out();
    return true;
  }

  // Every query of the call reads each token that it may see once, and none that comes after it.
  void check_views(std::int64_t queries) {
    const Extent& x = ledger_.extent();
    const bool stepwise = queries <= kPageTokens;
    std::int64_t position = length() - queries;
    while (position < length()) {
      const View view = ledger_.view(position, stepwise, length());
      const std::int64_t end = std::min(ledger_.view_end(position, stepwise), length());
      ASSERT_GT(end, position);
      const View last = ledger_.view(end - 1, stepwise, length());
      ASSERT_EQ(view.pages, last.pages) << "queries of one run read other pages";
      ASSERT_TRUE(end == length() || ledger_.view(end, stepwise, length()).pages != view.pages);
      const std::int64_t window = ledger_.policy().sliding_window;
      const std::int64_t oldest = window > 0 ? std::max<std::int64_t>(0, position - window + 1) : 0;
      std::int64_t expected = std::max(oldest, x.anchored ? x.start : x.window_position);
      for (std::int64_t i = expected; i > oldest;)
        ASSERT_TRUE(hidden_[static_cast<std::size_t>(--i)]) << "position " << i << " was dropped and is no padding";
      const auto read = [&](std::int64_t at, Token token) {
        if (at < expected) return;
        ASSERT_EQ(at, expected) << "a position is missing or is read twice";
        ASSERT_EQ(token, tokens_[static_cast<std::size_t>(at)]);
        ++expected;
      };
      for (std::int64_t i = view.sinks.begin; i < view.sinks.end; ++i) read(i, row(i));
      for (std::int64_t i = 0; i < view.pages; ++i) {
        const std::int64_t tokens = i + 1 == view.pages ? view.last_page_tokens : kPageTokens;
        for (std::int64_t j = 0; j < tokens; ++j)
          read(view.pages_position + i * kPageTokens + j,
               (*pages_)[ledger_.pages()[static_cast<std::size_t>(i)]][static_cast<std::size_t>(j)]);
      }
      for (std::int64_t i = view.window.begin; i < view.window.end; ++i) read(i, row(i));
      ASSERT_EQ(expected, length()) << "what the queries from " << position << " on read ends too early";
      position = end;
    }
  }

 private:
  // The fast paths of a call that seals nothing give the results of its plan.
  void check_extend(std::int64_t count) const {
    Ledger planned = ledger_, extended = ledger_;
    Plan plan = plan_;
    planned.commit(plan, {});
    extended.extend(count);
    expect_equal(planned, extended);
  }
  void check_tell(const std::vector<std::uint8_t>& seen) const {
    Ledger planned = ledger_, marked = ledger_;
    Plan plan = plan_;
    planned.commit(plan, {});
    marked.mark_seen(0, [&](std::int64_t position) {
      return seen[static_cast<std::size_t>(position - marked.extent().window_position)] != 0;
    });
    expect_equal(planned, marked);
  }
  static void expect_equal(const Ledger& a, const Ledger& b) {
    ASSERT_EQ(a.extent(), b.extent());
    ASSERT_TRUE(std::ranges::equal(a.pages(), b.pages()));
    ASSERT_TRUE(std::ranges::equal(a.marks(), b.marks()));
  }

  Token row(std::int64_t position) const {
    const Token token = position < static_cast<std::int64_t>(rows_.size()) ? rows_[static_cast<std::size_t>(position)]
                                                                           : kGone;
    EXPECT_NE(token, kGone) << "no exact row at " << position;
    return token;
  }

  // In the order that the header gives: what comes before commit writes to new pages and rows only.
  void carry_out() {
    const Extent before = ledger_.extent();
    for (const Rows& rows : {plan_.lambda, plan_.unsunk, plan_.sinks})
      for (std::int64_t i = rows.begin; i < rows.end; ++i) row(i);
    std::vector<PageId> fresh;
    for (std::int64_t i = 0; i < plan_.new_pages; ++i) fresh.push_back(pages_->take());
    if (plan_.fills_last(before)) own_last();
    for (std::int64_t i = plan_.sealed.begin; i < plan_.sealed.end; ++i) {
      const std::int64_t offset = i - before_page(plan_.first_sealed);
      const std::int64_t index = plan_.first_sealed + offset / kPageTokens;
      // Pages that are new are counted from the end of the table as it will be without them.
      const std::int64_t old = plan_.after.page_end() - plan_.new_pages;
      const PageId id = index < old ? ledger_.pages().back() : fresh.at(static_cast<std::size_t>(index - old));
      const Token token = ledger_.policy().arrival() ? tokens_.at(static_cast<std::size_t>(i)) : row(i);
      (*pages_)[id][static_cast<std::size_t>(offset % kPageTokens)] = token;
    }
    for (std::int64_t i = plan_.reopened.begin; i < plan_.reopened.end; ++i) {
      const PageId id = ledger_.pages()[static_cast<std::size_t>(plan_.reopened_page - before.first_page)];
      put(i, (*pages_)[id][static_cast<std::size_t>(i - plan_.reopened.begin)]);
    }
    if (!plan_.erased.empty()) rows_.erase(rows_.begin() + plan_.erased.begin, rows_.begin() + plan_.erased.end);
    for (std::int64_t i = plan_.stored.begin; i < plan_.stored.end; ++i)
      put(i, tokens_.at(static_cast<std::size_t>(i)));
    std::vector<PageId> old(ledger_.pages().begin(), ledger_.pages().end());
    const std::vector<PageId> released = plan_.released;
    const Extent after = plan_.after;
    ledger_.make_room(plan_);
    ledger_.commit(plan_, fresh);
    ASSERT_EQ(ledger_.extent(), after);
    check_table(old, fresh, released);
    for (const PageId id : released) pages_->release(id);
    rows_.resize(static_cast<std::size_t>(after.length), kGone);
    for (std::int64_t i = 0; i < after.window_position; ++i)
      if (i < after.start || i >= after.start + after.sinks) rows_[static_cast<std::size_t>(i)] = kGone;
    for (std::int64_t i = after.start; i < after.start + after.sinks; ++i) row(i);
    for (std::int64_t i = after.window_position; i < after.length; ++i) row(i);
  }
  std::int64_t before_page(std::int64_t index) const { return plan_.after.page_position(ledger_.policy(), index); }

  // The new table and what is given up are the old one and the new pages.
  void check_table(std::vector<PageId> old, const std::vector<PageId>& fresh, const std::vector<PageId>& released) {
    std::vector<PageId> want(old.begin() + plan_.kept.begin, old.begin() + plan_.kept.end);
    want.insert(want.end(), fresh.begin(), fresh.end());
    ASSERT_TRUE(std::ranges::equal(ledger_.pages(), want));
    old.insert(old.end(), fresh.begin(), fresh.end());
    std::vector<PageId> now(ledger_.pages().begin(), ledger_.pages().end());
    now.insert(now.end(), released.begin(), released.end());
    ASSERT_TRUE(std::is_permutation(old.begin(), old.end(), now.begin(), now.end()));
    ASSERT_EQ(static_cast<std::int64_t>(ledger_.pages().size()), ledger_.extent().pages);
    const Policy& p = ledger_.policy();
    ASSERT_EQ(static_cast<std::int64_t>(ledger_.marks().size()), p.seals() ? ledger_.extent().window_rows() : 0);
  }

  void put(std::int64_t position, Token token) {
    if (position >= static_cast<std::int64_t>(rows_.size()))
      rows_.resize(static_cast<std::size_t>(position) + 1, kGone);
    rows_[static_cast<std::size_t>(position)] = token;
  }

  void own_last() {
    const PageId last = ledger_.pages().back();
    if (pages_->references(last) == 1) return;
    const PageId mine = pages_->take();
    (*pages_)[mine] = (*pages_)[last];
    pages_->release(ledger_.replace_last(mine));
  }

  Ledger ledger_;
  Pages* pages_;
  std::vector<Token> tokens_;
  std::vector<bool> hidden_;
  std::vector<Token> rows_;  // exact rows by position; kGone where none is held
  Plan plan_;
  bool recording_ = false;
};

}  // namespace kv4::ledger
