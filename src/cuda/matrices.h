// The matrices of rotations in device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda/attend.h"
#include "cuda/memory.h"
#include "cuda/seal_digits.h"

namespace kv4::cuda {

// A rotation's matrices in device memory; null for the identity. They go with the rotation, whatever is being captured
// then.
struct Matrices final : RotationTable {
  explicit Matrices(int on) : device(on) {}
  ~Matrices() override;
  std::size_t bytes() const override { return memory == nullptr ? 0 : memory->size(); }

  const int device;
  std::unique_ptr<DeviceBuffer> memory;
  const float* rotation_transpose = nullptr;  // R^T by rows
  PackedMatrix inverse_packed, inverse_transpose_packed;
  const double* rotation_transpose_f64 = nullptr;
  const std::uint16_t* rotation_digits = nullptr;  // seal_digits.h
  float digit_unit = 0;
  DigitFragments inverse_digits;  // of rows X, X R^-1
};

// One per device, which is never destroyed.
class Rotations {
 public:
  explicit Rotations(int device) : device_(device) {}
  // For as long as the rotation lives; null where memory ran out. The first call for a rotation waits for its upload.
  const Matrices* find(const std::shared_ptr<const Rotation>& rotation) const;
  // What a call of find has made; null where there was none.
  const RotationTable* made(const Rotation& rotation) const { return rotation.table_on(this); }

 private:
  const int device_;
};

}  // namespace kv4::cuda
