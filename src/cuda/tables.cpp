#include "cuda/tables.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

namespace kv4::cuda {

static_assert(std::is_trivially_copyable_v<SequenceView> && sizeof(SequenceView) == 256,
              "compared and copied as bytes, without padding");

CacheTables::~CacheTables() {
  const DeviceGuard guard(device_);
  scratch_.leave(&held_scratch_);
  release();
}

void CacheTables::release() {
  memory_.free(sequences_);
  for (std::int32_t*& limits : limits_) {
    memory_.free(limits);
    limits = nullptr;
  }
  sequences_ = nullptr;
}

std::size_t CacheTables::bytes() const {
  const std::size_t batch = known_.size();
  return sizeof *this + batch * 2 * (sizeof(SequenceView) + sizeof(std::int32_t));
}

Status CacheTables::reserve(std::size_t batch) {
  if (batch == known_.size() && sequences_ != nullptr) return {};
  KV4_ON_DEVICE(device_);
  release();
  known_.clear();
  for (auto& limits : known_limits_) limits.clear();
  const auto make = [&](auto** out, std::size_t bytes) {
    void* memory = nullptr;
    const Status status = memory_.alloc("sequences", bytes, &memory);
    *out = static_cast<std::remove_reference_t<decltype(*out)>>(memory);
    return status;
  };
  KV4_RETURN_IF_ERROR(make(&sequences_, batch * sizeof(SequenceView)));
  for (std::int32_t*& limits : limits_) KV4_RETURN_IF_ERROR(make(&limits, batch * sizeof(std::int32_t)));
  known_.assign(batch, SequenceView());
  for (SequenceView& s : known_) s.page_count = -1;  // like nothing that is wanted
  return {};
}

Status CacheTables::sync(std::span<const SequenceView> wanted) {
  KV4_RETURN_IF_ERROR(reserve(wanted.size()));
  std::size_t first = wanted.size(), end = 0;
  for (std::size_t b = 0; b < wanted.size(); ++b) {
    if (std::memcmp(&wanted[b], &known_[b], sizeof known_[b]) == 0) continue;
    known_[b] = wanted[b];
    first = std::min(first, b);
    end = b + 1;
  }
  if (first >= end) return {};
  const Status status = memory_.upload(sequences_ + first, known_.data() + first, (end - first) * sizeof(SequenceView));
  if (!status.ok())
    for (std::size_t b = first; b < end; ++b) known_[b].page_count = -1;
  return status;
}

void CacheTables::expect() {
  for (SequenceView& s : known_) {
    s.exact[1].count += s.query_count;
    s.query_position += s.query_count;
  }
}

Status CacheTables::limits(Limit which, const std::int32_t* host, bool capturing, const std::int32_t** out) {
  *out = nullptr;
  if (host == nullptr) return {};
  std::vector<std::int32_t>& known = known_limits_[which];
  if (!std::equal(known.begin(), known.end(), host, host + known_.size())) {
    if (capturing)
      return error(StatusCode::failed_precondition, which == kStart ? "start" : "window",
                   "that of a call before the capture", "another");
    known.clear();
    KV4_RETURN_IF_ERROR(memory_.upload(limits_[which], host, known_.size() * sizeof(std::int32_t)));
    known.assign(host, host + known_.size());
  }
  *out = limits_[which];
  return {};
}

}  // namespace kv4::cuda
