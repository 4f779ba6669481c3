// Pages of one layer: fixed-size, from slabs, counted by id so that forks share them.
//
// Each slab has a range of 1 << chunk_shift ids, of which it may use only the first few; its address is in a table that
// kernels read. A table that has become too small is kept beside its successor: queued and captured work and clones in
// other threads may still read it, and it covers all pages that they hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "cache/block.h"
#include "ledger/ledger.h"

namespace kv4 {

using ledger::PageId;

struct Page {
  std::int32_t references = 0;
  std::int32_t next = -1;  // while it is free: the next free page of the slab
};

struct Slab;
using Slabs = std::list<Slab>;
struct Slab {
  std::uint8_t* memory = nullptr;
  std::size_t bytes = 0;
  std::int32_t chunk = 0;  // its ids begin at chunk << chunk_shift
  std::int32_t count = 0, used = 0;
  std::int32_t free = -1;  // chain of its free pages
  std::unique_ptr<Page[]> pages;
  Slabs::iterator place;  // in the pool's list that holds it

  std::size_t held_bytes() const { return bytes + sizeof(Slab) + static_cast<std::size_t>(count) * sizeof(Page); }
};

// Allocating and freeing a page take constant time; thread-safe.
class PagePool {
 public:
  PagePool(Backend& backend, std::size_t head_bytes, int heads);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // `count` pages with one reference each appended to out; out_of_memory leaves out as it was.
  Status allocate(std::size_t count, std::vector<PageId>* out);
  // Free pages for `count` that are allocated later.
  Status reserve(std::size_t count);
  void retain(std::span<const PageId> ids) noexcept;
  // The last reference returns the page.
  void release(std::span<const PageId> ids) noexcept;
  bool shared(PageId id) const;

  // How kernels find the pages that are allocated so far.
  PageMemory memory() const;
  std::uint8_t* page(PageId id) const;
  std::size_t page_bytes() const { return page_bytes_; }
  std::size_t bytes() const;  // slabs, used or not, and their bookkeeping
  // Pages and slabs looked at under the lock so far, for tests of what a call costs.
  std::uint64_t visits() const;

 private:
  Status grow(std::size_t count);  // to at least `count` free pages; under the lock, as all that follow
  Status add_slab(std::size_t count);
  Status make_table(std::size_t chunks);
  void forget_tables(std::vector<std::shared_ptr<Block>>* gone) noexcept;
  PageId take();
  Slab& slab_of(PageId id) const { return *slabs_[static_cast<std::size_t>(id >> shift_)]; }
  Page& page_of(PageId id) const {
    return slab_of(id).pages[static_cast<std::size_t>(id & ((std::int32_t{1} << shift_) - 1))];
  }

  Backend& backend_;
  const std::size_t head_bytes_, page_bytes_;
  int shift_ = 0;
  std::size_t most_in_slab_ = 0;  // pages
  mutable std::mutex mutex_;
  // Slabs with a free page, those in use before fresh ones, and slabs without.
  Slabs open_, full_;
  std::vector<Slab*> slabs_;  // by chunk; null where none is
  std::vector<std::int32_t> free_chunks_;
  std::vector<std::shared_ptr<Block>> tables_;  // [chunks] addresses; the last is in use
  std::size_t pages_ = 0, free_ = 0;            // of all slabs
  std::size_t bytes_ = 0;                       // of slabs
  std::uint64_t visits_ = 0;
};

// Pages that are returned to their pool unless ownership is taken over.
class FreshPages {
 public:
  explicit FreshPages(PagePool* pool) : pool_(pool) {}
  FreshPages(FreshPages&&) noexcept = default;
  FreshPages& operator=(FreshPages&&) = delete;
  ~FreshPages() {
    if (!ids_.empty()) pool_->release(ids_);
  }
  Status allocate(std::int64_t count) {
    return count > 0 ? pool_->allocate(static_cast<std::size_t>(count), &ids_) : Status();
  }
  std::span<const PageId> ids() const { return ids_; }
  void hand_over() noexcept { ids_.clear(); }

 private:
  PagePool* pool_;
  std::vector<PageId> ids_;
};

}  // namespace kv4
