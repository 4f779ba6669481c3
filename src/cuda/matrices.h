// The matrices of rotations in device memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda/attend.h"
#include "cuda/memory.h"

namespace kv4::cuda {

// A rotation's matrices in device memory; null for the identity.
struct Matrices {
  DeviceBuffer memory;
  const float* rotation_transpose = nullptr;  // R^T by rows
  const float* inverse_transpose = nullptr;   // (R^-1)^T by rows
  PackedMatrix inverse_packed, inverse_transpose_packed;
  const double* rotation_transpose_f64 = nullptr;
  const std::uint16_t* rotation_digits = nullptr;  // seal_digits.h
  float digit_unit = 0;
};

// One per device.
class Rotations {
 public:
  // Kept while anyone holds the rotation, and until another one is new; null where memory ran out. The first call for a rotation waits for its upload.
  const Matrices* find(const std::shared_ptr<const Rotation>& rotation);

 private:
  std::mutex mutex_;
  std::map<const Rotation*, std::pair<std::weak_ptr<const Rotation>, std::unique_ptr<Matrices>>> held_;
};

}  // namespace kv4::cuda
