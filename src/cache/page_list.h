// The page table of one sequence: counted references, and beside them the addresses as backends take them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cache/pool.h"

namespace kv4 {

class PageList {
 public:
  // Of a list and a copy of it one goes on alone, or both do after fork() of both.
  void fork() { forked_ = true; }
  // The other one, which goes on no more, may have given pages to what goes by stamps.
  void renew() {
    stamp_ = next_stamp();
    forked_ = false;
  }

  bool empty() const { return refs_.empty(); }
  std::size_t size() const { return refs_.size(); }
  const PageRef& operator[](std::size_t i) const { return refs_[i]; }
  const PageRef& back() const { return refs_.back(); }
  const std::uint8_t* const* data() const { return data_.data(); }
  // Tables of equal stamps agree as far as both reach: appending keeps it, but to a forked list; everything else
  // renews it.
  std::uint64_t stamp() const { return stamp_; }
  std::size_t bytes() const { return refs_.capacity() * sizeof(PageRef) + data_.capacity() * sizeof(data_[0]); }

  void append(PageRef page) {
    if (forked_) renew();
    data_.push_back(page.data());
    refs_.push_back(std::move(page));
  }
  void append(std::vector<PageRef> pages) {
    for (PageRef& page : pages) append(std::move(page));
  }
  void replace_back(PageRef page) {
    data_.back() = page.data();
    refs_.back() = std::move(page);
    renew();
  }
  void drop_front() {
    refs_.erase(refs_.begin());
    data_.erase(data_.begin());
    renew();
  }
  void truncate(std::size_t count) {
    if (count >= size()) return;
    refs_.resize(count);
    data_.resize(count);
    renew();
  }
  void clear() { truncate(0); }

 private:
  static std::uint64_t next_stamp() {
    static std::atomic<std::uint64_t> last{0};
    return last.fetch_add(1, std::memory_order_relaxed) + 1;
  }

  std::vector<PageRef> refs_;
  std::vector<const std::uint8_t*> data_;
  std::uint64_t stamp_ = next_stamp();
  bool forked_ = false;
};

}  // namespace kv4
