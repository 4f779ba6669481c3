// A cache's sequences and page tables in device memory, brought in line where the host's changed: in a decode step nothing
// did but counts, which the store kernel raises itself.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "cuda/memory.h"
#include "cuda/scratch.h"

namespace kv4::cuda {

class CacheTables final : public DeviceTables {
 public:
  CacheTables(int device, Memory& memory, Scratch& scratch) : device_(device), memory_(memory), scratch_(scratch) {}
  ~CacheTables() override;

  Status reserve(std::size_t batch, std::size_t pages) override;
  std::size_t bytes() const override;

  // The device's sequences become `wanted`, with the page tables that they name.
  Status sync(std::span<const SequenceView> wanted);
  // What a store that counts `tokens` has left in them.
  void expect(int tokens);
  SequenceView* sequences() const { return sequences_; }
  // The cache's part in the scratch of the stream that it was last called on.
  Scratch::Held* scratch() { return &held_scratch_; }

  enum Limit { kStart, kWindow };
  // The device's copy of a mask's start or window [batch], null for null. Errors: failed_precondition where it would have
  // to change while a stream is captured.
  Status limits(Limit which, const std::int32_t* host, bool capturing, const std::int32_t** out);

 private:
  struct Table {
    std::uint64_t stamp = 0;
    int count = 0;
  };
  void release();
  Status sync_pages(std::size_t row, const SequenceView& wanted);

  const int device_;
  Memory& memory_;
  Scratch& scratch_;
  Scratch::Held held_scratch_;
  SequenceView* sequences_ = nullptr;         // [batch]
  const std::uint8_t** tables_ = nullptr;     // [batch][capacity_]
  std::int32_t* limits_[2] = {};              // [batch] each
  std::size_t capacity_ = 0;
  // What the device holds, or will once what is queued has run.
  std::vector<SequenceView> known_;
  std::vector<Table> held_;
  std::vector<std::int32_t> known_limits_[2];
};

}  // namespace kv4::cuda
