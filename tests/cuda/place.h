// Sessions of a cache (cache_session.h) whose rows, queries and outputs are on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cache_session.h"
#include "device.h"

namespace kv4::tests {

class DevicePlace final : public sessions::Place {
 public:
  explicit DevicePlace(DType dtype) : dtype_(dtype) {}
  std::string backend() const override { return "cuda"; }
  DType dtype() const override { return dtype_; }
  double page_weights() const override { return 255; }
  // Rows of 16 bits are products with one digit of the matrix, whose entries, at most sqrt(2 / d), are wrong by at most
  // 2^-11 of that (cuda/dequantise.cu).
  double reopened() const override { return std::sqrt(2.0) * 0x1p-11; }
  TensorView rows(const std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t,
                  std::int64_t d) override {
    std::vector<std::uint16_t> halves(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) halves[i] = dtype_ == DType::f16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]);
    TensorView v = sessions::view(x, b, h, t, d);
    v.data = keep(DeviceBytes(halves));
    v.dtype = dtype_;
    return v;
  }
  TensorView queries(const std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t,
                     std::int64_t d) override {
    TensorView v = sessions::view(x, b, h, t, d);
    v.data = keep(DeviceBytes(x));
    return v;
  }
  MutableTensorView into(std::vector<float>& x, std::int64_t b, std::int64_t h, std::int64_t t,
                         std::int64_t d) override {
    MutableTensorView v = sessions::into(x, b, h, t, d);
    v.data = keep(DeviceBytes(x));
    wanted_.push_back({&x, held_.size() - 1});
    return v;
  }
  void fetch() override {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (const auto& [to, at] : wanted_) {
      const std::vector<std::uint8_t> bytes = held_[at].read();
      std::memcpy(to->data(), bytes.data(), bytes.size());
    }
    wanted_.clear();
  }

 private:
  void* keep(DeviceBytes bytes) {
    held_.push_back(std::move(bytes));
    return held_.back().as<void>();
  }
  DType dtype_;
  std::vector<DeviceBytes> held_;  // queries are used again after a fetch
  std::vector<std::pair<std::vector<float>*, std::size_t>> wanted_;
};

}  // namespace kv4::tests
