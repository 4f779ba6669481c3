// A cache's sequences in device memory, brought in line where the host's changed: in a decode step nothing did but
// counts, which the store kernel raises itself.
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

  Status reserve(std::size_t batch) override;
  std::size_t bytes() const override;

  // The device's sequences become `wanted`.
  Status sync(std::span<const SequenceView> wanted);
  // What a store that counts has left in them.
  void expect();
  SequenceView* sequences() const { return sequences_; }
  std::size_t batch() const { return known_.size(); }
  // The cache's part in the scratch of the stream that it was last called on.
  Scratch::Held* scratch() { return &held_scratch_; }

  enum Limit { kStart, kWindow };
  // The device's copy of a mask's start or window [batch], null for null. Errors: failed_precondition where it would
  // have to change while a stream is captured.
  Status limits(Limit which, const std::int32_t* host, bool capturing, const std::int32_t** out);

 private:
  void release();

  const int device_;
  Memory& memory_;
  Scratch& scratch_;
  Scratch::Held held_scratch_;
  SequenceView* sequences_ = nullptr;  // [batch]
  std::int32_t* limits_[2] = {};       // [batch] each
  // What the device holds, or will once what is queued has run.
  std::vector<SequenceView> known_;
  std::vector<std::int32_t> known_limits_[2];
};

}  // namespace kv4::cuda
