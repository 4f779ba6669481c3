#include "cuda/matrices.h"

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/pack.h"
#include "cuda/seal_digits.h"

namespace kv4::cuda {
namespace {

cudaError_t upload(const Rotation& rotation, Matrices* out) {
  if (rotation.kind() == RotationKind::identity) return cudaSuccess;
  const std::size_t d = static_cast<std::size_t>(rotation.dim()), n = d * d;
  const std::vector<double> forward = rotation.matrix_f64(), inverse = rotation.inverse_f64();
  std::vector<double> forward_transpose(n), inverse_transpose(n);
  for (std::size_t i = 0; i < d; ++i) {
    for (std::size_t c = 0; c < d; ++c) {
      forward_transpose[c * d + i] = forward[i * d + c];
      inverse_transpose[c * d + i] = inverse[i * d + c];
    }
  }
  const std::vector<float> narrow(forward_transpose.begin(), forward_transpose.end());
  const std::vector<std::uint32_t> packed = pack_matrix(inverse, rotation.dim(), &out->inverse_packed.scale);
  const std::vector<std::uint32_t> packed_transpose =
      pack_matrix(inverse_transpose, rotation.dim(), &out->inverse_transpose_packed.scale);
  const std::vector<std::uint16_t> digit_matrices = digits_of(forward, rotation.dim(), &out->digit_unit),
                                   inverse_digits =
                                       digit_fragments_of(inverse, rotation.dim(), &out->inverse_digits.unit);
  out->memory = std::make_unique<DeviceBuffer>();
  if (const cudaError_t e = out->memory->make(n * 32); e != cudaSuccess) return e;
  auto* at = static_cast<std::byte*>(out->memory->data());
  const auto put = [&at](const auto& values) {
    const cudaError_t e = cudaMemcpy(at, values.data(), values.size() * sizeof(values[0]), cudaMemcpyHostToDevice);
    const std::byte* from = at;
    at += values.size() * sizeof(values[0]);
    return std::pair(e, from);
  };
  const auto [e0, doubles] = put(forward_transpose);
  const auto [e1, floats] = put(narrow);
  const auto [e2, inverse_words] = put(inverse_digits);
  const auto [e3, words] = put(packed);
  const auto [e4, transpose_words] = put(packed_transpose);
  const auto [e5, digits] = put(digit_matrices);
  for (cudaError_t e : {e0, e1, e2, e3, e4, e5})
    if (e != cudaSuccess) return e;
  out->rotation_transpose_f64 = reinterpret_cast<const double*>(doubles);
  out->rotation_transpose = reinterpret_cast<const float*>(floats);
  out->inverse_digits.words = reinterpret_cast<const uint4*>(inverse_words);
  out->rotation_digits = reinterpret_cast<const std::uint16_t*>(digits);
  out->inverse_packed.words = reinterpret_cast<const uint4*>(words);
  out->inverse_transpose_packed.words = reinterpret_cast<const uint4*>(transpose_words);
  return cudaSuccess;
}

}  // namespace

Matrices::~Matrices() {
  if (memory == nullptr) return;
  // To free memory is what a capture, any thread's, takes amiss of threads in another mode than this.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  const bool relaxed = cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess;
  {
    const DeviceGuard guard(device);
    memory.reset();
  }
  if (relaxed) cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // a driver that is gone already, at exit, has freed it
}

const Matrices* Rotations::find(const std::shared_ptr<const Rotation>& rotation) const {
  return static_cast<const Matrices*>(rotation->table_on(this, [&]() -> std::unique_ptr<RotationTable> {
    auto made = std::make_unique<Matrices>(device_);
    if (upload(*rotation, made.get()) == cudaSuccess) return made;
    cudaGetLastError();
    return nullptr;
  }));
}

}  // namespace kv4::cuda
