#include "cache/pool.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

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
  for (const Slabs* slabs : {&open_, &full_})
    for (const auto& slab : *slabs) backend_.free(slab->memory, slab->bytes);
}

Status PagePool::grow(std::size_t count) {
  while (free_ < count) {
    const std::size_t wanted = std::max(count - free_, pages_ / kGrowthDivisor);
    const std::size_t in_huge = kHugeSlabBytes / page_bytes_;
    const bool fills = in_huge > 0 && kHugeSlabBytes % page_bytes_ <= kHugeSlabBytes / kGrowthDivisor;
    const bool huge = fills && wanted >= in_huge && (pages_ + wanted) * page_bytes_ >= kHugeFrom;
    const std::size_t add = huge ? in_huge : std::min(std::max<std::size_t>(1, kSlabBytes / page_bytes_), wanted);
    // All that the host may have no memory for comes before the slab's own, which nobody else would give back.
    Slabs fresh;
    fresh.push_back(std::make_unique<Slab>());
    Slab* const slab = fresh.back().get();
    slab->count = add;
    slab->bytes = huge ? kHugeSlabBytes : add * page_bytes_;
    slab->pages = std::make_unique<Page[]>(add);
    slab->memory = backend_.alloc(slab->bytes);
    if (slab->memory == nullptr)
      return error(StatusCode::out_of_memory, "pages", std::to_string(slab->bytes) + " free bytes", "none");
    for (std::size_t i = add; i-- > 0;) {
      Page& page = slab->pages[i];
      page.data = static_cast<std::uint8_t*>(slab->memory) + i * page_bytes_;
      page.slab = slab;
      page.next = std::exchange(slab->free, &page);
    }
    pages_ += add;
    free_ += add;
    bytes_ += slab->held_bytes();
    slab->place = fresh.begin();
    open_.splice(open_.end(), fresh);
    visits_ += 1 + add;
  }
  return {};
}

Status PagePool::reserve(std::size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return grow(count);
}

Page* PagePool::take() {
  Slab& slab = *open_.front();
  Page* page = slab.free;
  slab.free = page->next;
  ++slab.used;
  --free_;
  if (slab.free == nullptr) full_.splice(full_.begin(), open_, slab.place);
  visits_ += 2;
  return page;
}

Status PagePool::allocate(std::size_t count, std::vector<PageRef>* out) {
  out->reserve(out->size() + count);
  const std::lock_guard<std::mutex> lock(mutex_);
  KV4_RETURN_IF_ERROR(grow(count));
  for (std::size_t i = 0; i < count; ++i) out->emplace_back(this, take());
  return {};
}

void PagePool::give_back(Page* page) {
  Slabs gone;  // its memory is freed without the lock
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Slab& slab = *page->slab;
    visits_ += 2;
    if (slab.free == nullptr) open_.splice(open_.begin(), full_, slab.place);
    page->next = std::exchange(slab.free, page);
    ++free_;
    if (--slab.used > 0) return;
    // The slab's last page came back: its memory goes too, so that a cropped cache really shrinks.
    gone.splice(gone.begin(), open_, slab.place);
    pages_ -= slab.count;
    free_ -= slab.count;
    bytes_ -= slab.held_bytes();
  }
  backend_.free(gone.front()->memory, gone.front()->bytes);
}

std::size_t PagePool::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

std::uint64_t PagePool::visits() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return visits_;
}

}  // namespace kv4
