#include "cache/pool.h"

#include <algorithm>
#include <iterator>
#include <limits>
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
// Entries of the first table. A captured step keeps reading the table it was captured with. Where steps are captured,
// slabs therefore grow with the pool, up to a size at which the first table covers more than a device's memory.
constexpr std::size_t kFirstChunks = 8, kFirstDeviceChunks = 4096;
constexpr std::size_t kDeviceSlabBytes = 64 << 20;

std::size_t in_huge(std::size_t page_bytes) {
  const std::size_t pages = kHugeSlabBytes / page_bytes;
  return kHugeSlabBytes % page_bytes <= kHugeSlabBytes / kGrowthDivisor ? pages : 0;
}
std::size_t in_slab(std::size_t page_bytes) { return std::max<std::size_t>(1, kSlabBytes / page_bytes); }

}  // namespace

PagePool::PagePool(Backend& backend, std::size_t head_bytes, int heads)
    : backend_(backend), head_bytes_(head_bytes), page_bytes_(head_bytes * static_cast<std::size_t>(heads)) {
  most_in_slab_ = std::max(in_slab(page_bytes_), in_huge(page_bytes_));
  if (!backend_.host_memory()) most_in_slab_ = std::max(most_in_slab_, kDeviceSlabBytes / page_bytes_);
  while (std::size_t{1} << shift_ < most_in_slab_) ++shift_;
}

PagePool::~PagePool() {
  for (const Slabs* slabs : {&open_, &full_})
    for (const Slab& slab : *slabs) backend_.free(slab.memory, slab.bytes);
}

Status PagePool::grow(std::size_t count) {
  while (free_ < count) {
    const std::size_t wanted = std::max(count - free_, pages_ / kGrowthDivisor), huge = in_huge(page_bytes_);
    const bool whole = huge > 0 && wanted >= huge && (pages_ + wanted) * page_bytes_ >= kHugeFrom;
    std::size_t size = whole ? huge : std::min(in_slab(page_bytes_), wanted);
    if (!backend_.host_memory()) size = std::max(size, std::min({wanted, pages_ / kGrowthDivisor, most_in_slab_}));
    if (Status added = add_slab(size); !added.ok()) {
      std::vector<std::shared_ptr<Block>> gone;
      forget_tables(&gone);
      return added;
    }
  }
  return {};
}

// Without slabs only captured steps read the table.
void PagePool::forget_tables(std::vector<std::shared_ptr<Block>>* gone) noexcept {
  if (pages_ > 0 || !backend_.host_memory()) return;
  gone->swap(tables_);
  std::vector<Slab*>().swap(slabs_);
  std::vector<std::int32_t>().swap(free_chunks_);
}

Status PagePool::add_slab(std::size_t count) {
  // If host memory runs out (an exception), what was prepared is undone.
  struct Forget {
    PagePool& pool;
    ~Forget() {
      std::vector<std::shared_ptr<Block>> gone;
      pool.forget_tables(&gone);
    }
  } const forget{*this};
  const bool reused = !free_chunks_.empty();
  const auto chunk = reused ? static_cast<std::size_t>(free_chunks_.back()) : slabs_.size();
  if (chunk >= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()) >> shift_)
    return error(StatusCode::out_of_memory, "pages", "fewer than 2^31", "more");
  // Everything that may run out of memory comes before the slab's own allocation, which nothing else would free.
  if (slabs_.capacity() <= chunk) slabs_.reserve(2 * chunk + 1);
  free_chunks_.reserve(slabs_.capacity());
  Slabs fresh(1);
  Slab& slab = fresh.front();
  slab.chunk = static_cast<std::int32_t>(chunk);
  slab.count = static_cast<std::int32_t>(count);
  slab.bytes = count == in_huge(page_bytes_) ? kHugeSlabBytes : count * page_bytes_;
  slab.pages = std::make_unique<Page[]>(count);
  KV4_RETURN_IF_ERROR(make_table(chunk + 1));
  slab.memory = static_cast<std::uint8_t*>(backend_.alloc(slab.bytes));
  if (slab.memory == nullptr)
    return error(StatusCode::out_of_memory, "pages", std::to_string(slab.bytes) + " free bytes", "none");
  if (Status uploaded = backend_.upload(static_cast<void*>(tables_.back()->as<std::uint8_t*>() + chunk),
                                        static_cast<const void*>(&slab.memory), sizeof slab.memory);
      !uploaded.ok()) {
    backend_.free(slab.memory, slab.bytes);
    return uploaded;
  }
  for (std::int32_t i = slab.count; i-- > 0;)
    slab.pages[static_cast<std::size_t>(i)].next = std::exchange(slab.free, i);
  reused ? free_chunks_.pop_back() : slabs_.push_back(nullptr);
  slabs_[chunk] = &slab;
  pages_ += count;
  free_ += count;
  bytes_ += slab.held_bytes();
  slab.place = fresh.begin();
  open_.splice(open_.end(), fresh);
  visits_ += 1 + count;
  return {};
}

Status PagePool::make_table(std::size_t chunks) {
  const std::size_t have = tables_.empty() ? 0 : tables_.back()->bytes() / sizeof(std::uint8_t*);
  if (chunks <= have) return {};
  std::vector<std::uint8_t*> addresses(std::max(chunks, have > 0                 ? 2 * have
                                                        : backend_.host_memory() ? kFirstChunks
                                                                                 : kFirstDeviceChunks));
  for (std::size_t i = 0; i < slabs_.size(); ++i) addresses[i] = slabs_[i] != nullptr ? slabs_[i]->memory : nullptr;
  tables_.reserve(tables_.size() + 1);
  std::shared_ptr<Block> table;
  KV4_RETURN_IF_ERROR(Block::copy_of(backend_, "pages", static_cast<const void*>(addresses.data()),
                                     addresses.size() * sizeof(std::uint8_t*), &table));
  tables_.push_back(std::move(table));
  return {};
}

Status PagePool::reserve(std::size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return grow(count);
}

PageId PagePool::take() {
  Slab& slab = open_.front();
  const std::int32_t index = slab.free;
  Page& page = slab.pages[static_cast<std::size_t>(index)];
  slab.free = std::exchange(page.next, -1);
  page.references = 1;
  ++slab.used;
  --free_;
  if (slab.free < 0) full_.splice(full_.begin(), open_, slab.place);
  visits_ += 2;
  return (slab.chunk << shift_) + index;
}

Status PagePool::allocate(std::size_t count, std::vector<PageId>* out) {
  out->reserve(out->size() + count);
  const std::lock_guard<std::mutex> lock(mutex_);
  KV4_RETURN_IF_ERROR(grow(count));
  for (std::size_t i = 0; i < count; ++i) out->push_back(take());
  return {};
}

void PagePool::retain(std::span<const PageId> ids) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const PageId id : ids) ++page_of(id).references;
}

void PagePool::release(std::span<const PageId> ids) noexcept {
  Slabs gone;  // their memory is freed without the lock
  std::vector<std::shared_ptr<Block>> tables;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const PageId id : ids) {
      Page& page = page_of(id);
      if (--page.references > 0) continue;
      Slab& slab = slab_of(id);
      visits_ += 2;
      if (slab.free < 0) open_.splice(open_.begin(), full_, slab.place);
      page.next = std::exchange(slab.free, id & ((std::int32_t{1} << shift_) - 1));
      ++free_;
      if (--slab.used > 0) continue;
      // The slab's last page was returned: its memory is freed, so that a cropped cache really shrinks.
      gone.splice(gone.begin(), open_, slab.place);
      pages_ -= static_cast<std::size_t>(slab.count);
      free_ -= static_cast<std::size_t>(slab.count);
      bytes_ -= slab.held_bytes();
      slabs_[static_cast<std::size_t>(slab.chunk)] = nullptr;
      free_chunks_.push_back(slab.chunk);
    }
    forget_tables(&tables);
  }
  for (const Slab& slab : gone) backend_.free(slab.memory, slab.bytes);
}

bool PagePool::shared(PageId id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return page_of(id).references > 1;
}

PageMemory PagePool::memory() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  PageMemory memory;
  memory.chunks = tables_.empty() ? nullptr : tables_.back()->as<std::uint8_t*>();
  memory.page_stride = static_cast<std::int64_t>(page_bytes_);
  memory.head_stride = static_cast<std::int64_t>(head_bytes_);
  memory.chunk_shift = shift_;
  return memory;
}

std::uint8_t* PagePool::page(PageId id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return slab_of(id).memory + static_cast<std::size_t>(id & ((std::int32_t{1} << shift_) - 1)) * page_bytes_;
}

std::size_t PagePool::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t sum = bytes_ + slabs_.capacity() * sizeof(Slab*) + free_chunks_.capacity() * sizeof(std::int32_t);
  for (const std::shared_ptr<Block>& table : tables_) sum += table->bytes() + sizeof(Block);
  return sum;
}

std::uint64_t PagePool::visits() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return visits_;
}

}  // namespace kv4
