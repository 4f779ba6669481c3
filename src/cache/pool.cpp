#include "cache/pool.h"

#include <algorithm>
#include <string>

namespace kv4 {
namespace {

// A slab holds what is asked for at once, and at least 1/64 of what there is: slack stays below
// 1.6 % while a growing sequence allocates O(log n) slabs per doubling, not one per page.
constexpr std::size_t kGrowthDivisor = 64;
// No slab is larger, so that a crop gives memory back although some old pages stay.
constexpr std::size_t kMaxSlabBytes = 256 << 10;

}  // namespace

void PageRef::release() {
  if (page_ != nullptr && page_->references.fetch_sub(1, std::memory_order_acq_rel) == 1)
    pool_->give_back(page_);
  page_ = nullptr;
}

PagePool::~PagePool() {
  for (Slab& slab : slabs_) backend_.free(slab.memory, slab.bytes);
}

Status PagePool::allocate(std::size_t count, std::vector<PageRef>* out) {
  std::vector<Page*> taken;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (free_.size() < count) {
      const std::size_t most = std::max<std::size_t>(1, kMaxSlabBytes / page_bytes_);
      const std::size_t add = std::min(most, std::max(count - free_.size(), pages_ / kGrowthDivisor));
      Slab slab;
      slab.count = add;
      slab.bytes = add * page_bytes_;
      slab.memory = backend_.alloc(slab.bytes);
      if (slab.memory == nullptr)
        return error(StatusCode::out_of_memory, "pages", std::to_string(slab.bytes) + " free bytes",
                     "none");
      slab.pages = std::make_unique<Page[]>(add);
      slabs_.push_back(std::move(slab));
      Slab& held = slabs_.back();
      for (std::size_t i = add; i-- > 0;) {
        held.pages[i].data = static_cast<std::uint8_t*>(held.memory) + i * page_bytes_;
        held.pages[i].slab = &held;
        free_.push_back(&held.pages[i]);
      }
      pages_ += add;
    }
    for (std::size_t i = 0; i < count; ++i) {
      taken.push_back(free_.back());
      free_.pop_back();
      ++taken.back()->slab->used;
    }
  }
  for (Page* page : taken) out->emplace_back(this, page);
  return {};
}

void PagePool::give_back(Page* page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Slab* slab = page->slab;
  if (--slab->used > 0) {
    free_.push_back(page);
    return;
  }
  // The slab's last page came back: its memory goes too, so that a cropped cache really shrinks.
  std::erase_if(free_, [slab](const Page* p) { return p->slab == slab; });
  pages_ -= slab->count;
  backend_.free(slab->memory, slab->bytes);
  slabs_.remove_if([slab](const Slab& s) { return &s == slab; });
}

std::size_t PagePool::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t sum = free_.capacity() * sizeof(Page*);
  for (const Slab& slab : slabs_) sum += slab.bytes + sizeof(Slab) + slab.count * sizeof(Page);
  return sum;
}

}  // namespace kv4
