#include "cache/pool.h"

#include <algorithm>
#include <string>

namespace kv4 {
namespace {

// A slab holds what is asked for at once, and at least 1/64 of what there is: slack stays below
// 1.6 % while a growing sequence allocates O(log n) slabs per doubling, not one per page.
constexpr std::size_t kGrowthDivisor = 64;
// Slabs are small, so that a crop gives memory back although some old pages stay. A pool of four huge pages or
// more takes whole ones where it needs that much at once and its pages fill them: backends then spare the
// address cache.
constexpr std::size_t kSlabBytes = 256 << 10;
constexpr std::size_t kHugeSlabBytes = 2 << 20;
constexpr std::size_t kHugeFrom = 4 * kHugeSlabBytes;

}  // namespace

void PageRef::release() {
  if (page_ != nullptr && page_->references.fetch_sub(1, std::memory_order_acq_rel) == 1)
    pool_->give_back(page_);
  page_ = nullptr;
}

PagePool::~PagePool() {
  for (Slab& slab : slabs_) backend_.free(slab.memory, slab.bytes);
}

Status PagePool::grow(std::size_t count) {
  while (free_.size() < count) {
    const std::size_t wanted = std::max(count - free_.size(), pages_ / kGrowthDivisor);
    const std::size_t in_huge = kHugeSlabBytes / page_bytes_;
    const bool fills = in_huge > 0 && kHugeSlabBytes % page_bytes_ <= kHugeSlabBytes / kGrowthDivisor;
    const bool huge = fills && wanted >= in_huge && (pages_ + wanted) * page_bytes_ >= kHugeFrom;
    const std::size_t add = huge ? in_huge : std::min(std::max<std::size_t>(1, kSlabBytes / page_bytes_), wanted);
    Slab slab;
    slab.count = add;
    slab.bytes = huge ? kHugeSlabBytes : add * page_bytes_;
    // All that the host may have no memory for comes before the memory that nobody else would give back.
    slab.pages = std::make_unique<Page[]>(add);
    free_.reserve(pages_ + add);  // all of them may come back, which must not fail
    slabs_.push_back(std::move(slab));
    Slab& held = slabs_.back();
    held.memory = backend_.alloc(held.bytes);
    if (held.memory == nullptr) {
      const std::size_t bytes = held.bytes;
      slabs_.pop_back();
      return error(StatusCode::out_of_memory, "pages", std::to_string(bytes) + " free bytes", "none");
    }
    for (std::size_t i = add; i-- > 0;) {
      held.pages[i].data = static_cast<std::uint8_t*>(held.memory) + i * page_bytes_;
      held.pages[i].slab = &held;
      free_.push_back(&held.pages[i]);
    }
    pages_ += add;
  }
  return {};
}

Status PagePool::reserve(std::size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return grow(count);
}

Status PagePool::allocate(std::size_t count, std::vector<PageRef>* out) {
  std::vector<Page*> taken;
  taken.reserve(count);
  out->reserve(out->size() + count);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    KV4_RETURN_IF_ERROR(grow(count));
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
