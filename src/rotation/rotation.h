// A rotation as data, for every backend to execute: what kv4/rotation.h defines, with the tables that kernels read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "kv4/rotation.h"
#include "kv4/status.h"

namespace kv4 {

// Plan of a complex FFT of length `length` = product of `radix`, decimation in time, in place:
// element n is first stored at slot[n]; stage s then joins, for every block of radix[s]*span
// slots, the slots k, k+span, ... with twiddles exp(-2 pi i q k / (radix[s]*span)),
// span = product of the earlier radices. Order: a 2 and a 4 where the power of two is odd (kernels
// join them into one radix-8 stage), a 4 where it is even and at least 16; the odd primes,
// ascending; the remaining 4s, so that a last 4 can be joined with the real split.
struct FftPlan {
  int length = 0;
  std::vector<int> radix;             // each 2, 3, 4, 5 or an odd prime; in order of execution
  std::vector<std::uint16_t> slot;    // [length]
  std::vector<std::uint16_t> source;  // [length]: the inverse permutation, source[slot[n]] = n
  std::vector<float> twiddle;         // (re, im) pairs: for each stage, for k < span, for q = 1..radix-1
  std::vector<float> split;           // (re, im) of exp(-2 pi i k / (2*length)), k = 0..length: joins the real FFT
  std::vector<float> circle;          // (re, im) of exp(-2 pi i k / (2*length)), k < 2*length
  std::vector<float> root;            // for each stage of radix > 5: (re, im) of exp(-2 pi i j / radix), j < radix
  std::vector<double> twiddle_f64, split_f64, root_f64;  // the same in binary64
};

// A rotation's table in device memory.
class RotationTable {
 public:
  virtual ~RotationTable() = default;
  virtual std::size_t bytes() const = 0;  // of the device's memory
};

// Rotations are interned: a process has one object per definition (kind, d, seed and reflectors, or the matrix's
// bytes). The functions below build it or return the existing one; it is destroyed with its last reference.
// Thread-safe.
class Rotation {
 public:
  // Errors: invalid_argument for a dimension outside [kMinHeadDim, kMaxHeadDim] or odd,
  // reflectors outside [1, d], a matrix of the wrong size, with non-finite entries or singular
  // (condition number in the 1-norm beyond 2^23, where float32 scores would have no correct digit).
  static Status srft(int d, std::uint64_t seed, std::shared_ptr<const Rotation>* out);
  static Status srht(int d, std::uint64_t seed, std::shared_ptr<const Rotation>* out);
  static Status householder(int d, int reflectors, std::uint64_t seed, std::shared_ptr<const Rotation>* out);
  static Status dense(int d, std::span<const float> matrix, std::shared_ptr<const Rotation>* out);
  static Status identity(int d, std::shared_ptr<const Rotation>* out);

  RotationKind kind() const { return kind_; }
  int dim() const { return dim_; }

  const std::vector<float>& signs() const { return signs_; }  // [d], +-1: srft, srht
  // [d], signs with the kernels' one scale factor: / sqrt(2d) for srft (a pair X_j, X_(h-j) then
  // costs no further factor), / sqrt(2^k) for srht.
  const std::vector<float>& scaled_signs() const { return scaled_signs_; }
  const FftPlan& fft() const { return fft_; }                     // srft: length d/2
  int hadamard_order() const { return hadamard_order_; }          // srht: 2^k; the odd part is dim/2^k
  const std::vector<float>& odd_dft() const { return odd_dft_; }  // srht: F_m, row-major [m, m]
  int reflectors() const { return reflectors_; }
  const std::vector<float>& reflector_vectors() const {
    return vectors_;
  }  // [reflectors, d], unit norm; the first is applied first
  const std::vector<float>& matrix() const { return matrix_; }    // dense: R, row-major
  const std::vector<float>& inverse() const { return inverse_; }  // dense: R^-1, row-major
  const std::vector<float>& inverse_transpose() const { return inverse_transpose_; }

  std::size_t bytes() const;  // of this object and its tables, in host memory

  // This rotation's table on a device, shared by all users: made by the first call, destroyed with the rotation.
  // device: an address that is unique among devices while the table lives. make() -> std::unique_ptr<RotationTable>
  // runs under a lock; if it returns null, so does this call, and the next one tries again.
  template <class Make>
  const RotationTable* table_on(const void* device, const Make& make) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [owner, table] : tables_)
      if (owner == device) return table.get();
    std::unique_ptr<RotationTable> made = make();
    return made == nullptr ? nullptr : tables_.emplace_back(device, std::move(made)).second.get();
  }
  // Null if no call has made one.
  const RotationTable* table_on(const void* device) const {
    return table_on(device, [] { return std::unique_ptr<RotationTable>(); });
  }

  // The same tables in binary64.
  const std::vector<double>& scaled_signs_f64() const { return scaled_signs_f64_; }
  const std::vector<double>& odd_dft_f64() const { return odd_dft_f64_; }
  const std::vector<double>& reflector_vectors_f64() const { return vectors_f64_; }
  const std::vector<double>& dense_f64() const { return matrix_f64_; }           // dense: R, row-major
  const std::vector<double>& dense_inverse_f64() const { return inverse_f64_; }  // dense: R^-1, row-major

  // The float64 definition, row-major [d, d], from formulas and not from the plan.
  std::vector<double> matrix_f64() const;
  std::vector<double> inverse_f64() const;  // R^-1: the transpose where orthonormal

 private:
  friend class Interned;
  Rotation(RotationKind kind, int d, int reflectors = 0, std::uint64_t seed = 0)
      : kind_(kind), dim_(d), reflectors_(reflectors), seed_(seed) {}

  const RotationKind kind_;
  const int dim_;
  int hadamard_order_ = 0;
  const int reflectors_;
  std::vector<float> signs_, scaled_signs_, odd_dft_, vectors_, matrix_, inverse_, inverse_transpose_;
  std::vector<double> scaled_signs_f64_, odd_dft_f64_, vectors_f64_, matrix_f64_, inverse_f64_;
  FftPlan fft_;
  const std::uint64_t seed_;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<const void*, std::unique_ptr<RotationTable>>> tables_;  // one per device, so few
};

}  // namespace kv4
