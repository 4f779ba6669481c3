#include "cuda/tables.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

namespace kv4::cuda {

static_assert(std::is_trivially_copyable_v<SequenceView> && sizeof(SequenceView) == 192, "compared and copied as bytes, without padding");

CacheTables::~CacheTables() {
  const DeviceGuard guard(device_);
  scratch_.leave(&held_scratch_);
  release();
}

void CacheTables::release() {
  memory_.free(sequences_);
  memory_.free(tables_);
  for (std::int32_t*& limits : limits_) {
    memory_.free(limits);
    limits = nullptr;
  }
  sequences_ = nullptr;
  tables_ = nullptr;
  capacity_ = 0;
}

std::size_t CacheTables::bytes() const {
  const std::size_t batch = known_.size();
  return sizeof *this + batch * (2 * sizeof(SequenceView) + sizeof(Table) + capacity_ * sizeof(void*) + 2 * sizeof(std::int32_t));
}

Status CacheTables::reserve(std::size_t batch, std::size_t pages) {
  KV4_ON_DEVICE(device_);
  const auto make = [&](auto** out, std::size_t bytes) {
    void* memory = nullptr;
    const Status status = memory_.alloc("page tables", bytes, &memory);
    *out = static_cast<std::remove_reference_t<decltype(*out)>>(memory);
    return status;
  };
  if (batch != known_.size() || sequences_ == nullptr) {
    release();
    known_.clear();
    for (auto& limits : known_limits_) limits.clear();
    KV4_RETURN_IF_ERROR(make(&sequences_, batch * sizeof(SequenceView)));
    for (std::int32_t*& limits : limits_) KV4_RETURN_IF_ERROR(make(&limits, batch * sizeof(std::int32_t)));
    known_.assign(batch, SequenceView());
    for (SequenceView& s : known_) s.page_count = -1;  // like nothing that is wanted
  }
  if (pages > capacity_ || tables_ == nullptr) {
    const std::size_t capacity = std::max<std::size_t>(pages + pages / 4, 64);
    const std::uint8_t** grown = nullptr;
    KV4_RETURN_IF_ERROR(make(&grown, batch * capacity * sizeof(void*)));
    memory_.free(tables_);
    tables_ = grown;
    capacity_ = capacity;
    held_.assign(batch, Table());
  }
  return {};
}

Status CacheTables::sync_pages(std::size_t row, const SequenceView& wanted) {
  Table& held = held_[row];
  const bool same = held.stamp == wanted.pages_stamp && wanted.pages_stamp != 0;
  const int first = same ? held.count : 0;
  if (wanted.page_count > first) {
    held = Table();  // not known until it is there
    KV4_RETURN_IF_ERROR(memory_.upload(tables_ + row * capacity_ + first, wanted.pages + first,
                                       static_cast<std::size_t>(wanted.page_count - first) * sizeof(void*)));
  }
  held = {wanted.pages_stamp, std::max(first, wanted.page_count)};
  return {};
}

Status CacheTables::sync(std::span<const SequenceView> wanted) {
  std::size_t longest = 0;
  for (const SequenceView& s : wanted) longest = std::max(longest, static_cast<std::size_t>(s.page_count));
  KV4_RETURN_IF_ERROR(reserve(wanted.size(), longest));
  // All page tables first: what is noted in known_ below is then uploaded, or forgotten.
  for (std::size_t b = 0; b < wanted.size(); ++b) KV4_RETURN_IF_ERROR(sync_pages(b, wanted[b]));
  std::size_t first = wanted.size(), end = 0;
  for (std::size_t b = 0; b < wanted.size(); ++b) {
    SequenceView here = wanted[b];
    here.pages = tables_ + b * capacity_;
    here.pages_stamp = 0;
    if (std::memcmp(&here, &known_[b], sizeof here) == 0) continue;
    known_[b] = here;
    first = std::min(first, b);
    end = b + 1;
  }
  if (first >= end) return {};
  const Status status = memory_.upload(sequences_ + first, known_.data() + first, (end - first) * sizeof(SequenceView));
  if (!status.ok())
    for (std::size_t b = first; b < end; ++b) known_[b].page_count = -1;
  return status;
}

void CacheTables::expect(int tokens) {
  for (SequenceView& s : known_) {
    s.exact[1].count += tokens;
    s.query_position += tokens;
  }
}

Status CacheTables::limits(Limit which, const std::int32_t* host, bool capturing, const std::int32_t** out) {
  *out = nullptr;
  if (host == nullptr) return {};
  std::vector<std::int32_t>& known = known_limits_[which];
  if (!std::equal(known.begin(), known.end(), host, host + known_.size())) {
    if (capturing)
      return error(StatusCode::failed_precondition, which == kStart ? "start" : "window", "that of a call before the capture", "another");
    known.clear();
    KV4_RETURN_IF_ERROR(memory_.upload(limits_[which], host, known_.size() * sizeof(std::int32_t)));
    known.assign(host, host + known_.size());
  }
  *out = limits_[which];
  return {};
}

}  // namespace kv4::cuda
