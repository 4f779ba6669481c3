// Pages of one layer: fixed-size blocks from slabs, reference-counted so that forks share them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "backend/backend.h"

namespace kv4 {

class PagePool;
struct Slab;
using Slabs = std::list<std::unique_ptr<Slab>>;

struct Page {
  std::uint8_t* data = nullptr;
  std::atomic<std::int32_t> references{0};
  Slab* slab = nullptr;
  Page* next = nullptr;  // while it is free: the slab's free page behind it
};

// A counted reference; the last one returns the page to its pool. The pool outlives it.
class PageRef {
 public:
  PageRef() = default;
  PageRef(PagePool* pool, Page* page) : pool_(pool), page_(page) { retain(); }
  PageRef(const PageRef& o) : pool_(o.pool_), page_(o.page_) { retain(); }
  PageRef(PageRef&& o) noexcept : pool_(o.pool_), page_(std::exchange(o.page_, nullptr)) {}
  PageRef& operator=(PageRef o) noexcept {
    std::swap(pool_, o.pool_);
    std::swap(page_, o.page_);
    return *this;
  }
  ~PageRef() { release(); }

  std::uint8_t* data() const { return page_->data; }
  bool shared() const { return page_->references.load(std::memory_order_acquire) > 1; }

 private:
  void retain() {
    if (page_ != nullptr) page_->references.fetch_add(1, std::memory_order_relaxed);
  }
  void release();

  PagePool* pool_ = nullptr;
  Page* page_ = nullptr;
};

struct Slab {
  void* memory = nullptr;
  std::size_t bytes = 0;
  std::size_t count = 0;
  std::size_t used = 0;
  std::unique_ptr<Page[]> pages;
  Page* free = nullptr;   // chain of its free pages
  Slabs::iterator place;  // in the pool's list that holds it

  std::size_t held_bytes() const { return bytes + sizeof(Slab) + count * sizeof(Page); }
};

// Taking or giving back a page costs the same however many there are; thread-safe.
class PagePool {
 public:
  PagePool(Backend& backend, std::size_t page_bytes) : backend_(backend), page_bytes_(page_bytes) {}
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // `count` pages appended to out; out_of_memory leaves out as it was.
  Status allocate(std::size_t count, std::vector<PageRef>* out);
  // Free pages for `count` that are allocated later.
  Status reserve(std::size_t count);
  std::size_t bytes() const;  // slabs, used or not, and their bookkeeping
  std::size_t page_bytes() const { return page_bytes_; }
  // Pages and slabs looked at under the lock so far, for tests of what a call costs.
  std::uint64_t visits() const;

 private:
  friend class PageRef;
  void give_back(Page* page);
  Status grow(std::size_t count);  // to at least `count` free pages; under the lock
  Page* take();                    // a free page; under the lock

  Backend& backend_;
  const std::size_t page_bytes_;
  mutable std::mutex mutex_;
  // Slabs with a free page, those in use before fresh ones, and slabs without.
  Slabs open_, full_;
  std::size_t pages_ = 0, free_ = 0;  // of all slabs
  std::size_t bytes_ = 0;
  std::uint64_t visits_ = 0;
};

}  // namespace kv4
