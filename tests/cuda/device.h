// Device memory of tests, and a scene on the device: the same codes in the device's order, the same rows.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "attend_scene.h"
#include "cpu/order.h"
#include "cuda/backend.h"
#include "cuda/layout.h"
#include "cuda/order.h"

namespace kv4::tests {

// Bytes on the device, with guards behind them.
class DeviceBytes {
 public:
  DeviceBytes() = default;
  explicit DeviceBytes(std::size_t bytes, int fill = 0xff) : bytes_(bytes) {
    EXPECT_EQ(cudaMalloc(&data_, bytes + kGuardBytes), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, fill, bytes), cudaSuccess);
    EXPECT_EQ(cudaMemset(static_cast<std::byte*>(data_) + bytes, 0xff, kGuardBytes), cudaSuccess);
  }
  DeviceBytes(const void* from, std::size_t bytes) : DeviceBytes(bytes) {
    EXPECT_EQ(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  template <class T>
  explicit DeviceBytes(const std::vector<T>& from) : DeviceBytes(from.data(), from.size() * sizeof(T)) {}
  DeviceBytes(DeviceBytes&& o) noexcept : data_(std::exchange(o.data_, nullptr)), bytes_(o.bytes_) {}
  DeviceBytes& operator=(DeviceBytes&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~DeviceBytes() { cudaFree(data_); }

  template <class T = void>
  T* as() const { return static_cast<T*>(data_); }
  std::vector<std::uint8_t> read() const {
    std::vector<std::uint8_t> host(bytes_ + kGuardBytes);
    EXPECT_EQ(cudaMemcpy(host.data(), data_, host.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    EXPECT_TRUE(std::all_of(host.begin() + static_cast<std::ptrdiff_t>(bytes_), host.end(), [](std::uint8_t x) { return x == 0xff; })) << "written behind the end";
    host.resize(bytes_);
    return host;
  }

 private:
  static constexpr std::size_t kGuardBytes = 256;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

inline PageSpec on_device(PageSpec spec) {
  const auto pad = [](int d) { return static_cast<std::uint32_t>(cuda::pad_channels(d)); };
  spec.layout = kv4_make_page_layout(static_cast<std::uint32_t>(spec.key.dim), static_cast<std::uint32_t>(spec.value.dim),
                                     static_cast<std::uint32_t>(spec.key.groups), static_cast<std::uint32_t>(spec.value.groups),
                                     spec.key.mean, pad(spec.key.dim), pad(spec.value.dim));
  return spec;
}

class DeviceScene {
 public:
  explicit DeviceScene(const scene::Scene& s) : scene_(s), spec_(s.spec().key.rotation ? on_device(s.spec()) : PageSpec()) {
    const int heads = s.shape().kv_heads;
    if (s.shape().lambda) {
      lambda_k_ = DeviceBytes(s.lambda_k(0), static_cast<std::size_t>(heads * s.shape().dim_k) * 4);
      lambda_v_ = DeviceBytes(s.lambda_v(0), static_cast<std::size_t>(heads * s.shape().dim_v) * 4);
    }
    const std::vector<SequenceView> views = s.views(1);
    sequences_.resize(views.size());
    const std::size_t page_bytes = static_cast<std::size_t>(spec_.layout.head_bytes) * heads;
    for (std::size_t b = 0; b < views.size(); ++b) {
      Sequence& to = sequences_[b];
      const SequenceView& from = views[b];
      std::vector<std::uint8_t> pages(page_bytes * from.page_count);
      for (int p = 0; p < from.page_count; ++p)
        for (int h = 0; h < heads; ++h)
          convert(from.pages[p] + static_cast<std::size_t>(h) * s.spec().layout.head_bytes,
                  pages.data() + page_bytes * p + static_cast<std::size_t>(h) * spec_.layout.head_bytes);
      to.pages = DeviceBytes(pages);
      for (int p = 0; p < from.page_count; ++p) to.pointers.push_back(to.pages.as<std::uint8_t>() + page_bytes * p);
      for (int set = 0; set < 2; ++set) {
        const ExactRows& x = from.exact[set];
        if (x.count == 0) continue;
        const std::size_t size = size_of(s.shape().dtype);
        to.k[set] = DeviceBytes(x.k, static_cast<std::size_t>(x.k_head_stride * heads) * size);
        to.v[set] = DeviceBytes(x.v, static_cast<std::size_t>(x.v_head_stride * heads) * size);
      }
    }
  }
  std::vector<SequenceView> views(std::int64_t queries) const {
    std::vector<SequenceView> all = scene_.views(queries);
    for (std::size_t b = 0; b < all.size(); ++b) {
      all[b].pages = sequences_[b].pointers.data();
      all[b].lambda_k = lambda_k_.as<float>();
      all[b].lambda_v = lambda_v_.as<float>();
      for (int set = 0; set < 2; ++set) {
        all[b].exact[set].k = sequences_[b].k[set].as();
        all[b].exact[set].v = sequences_[b].v[set].as();
      }
    }
    return all;
  }
  const PageSpec& spec() const { return spec_; }

 private:
  struct Sequence {
    DeviceBytes pages, k[2], v[2];
    std::vector<const std::uint8_t*> pointers;
  };

  void convert(const std::uint8_t* from, std::uint8_t* to) const {
    const kv4_page_layout &a = scene_.spec().layout, &b = spec_.layout;
    std::vector<std::uint8_t> k(32u * a.head_dim_k), v(32u * a.head_dim_v);
    cpu::codes_to_canonical(scene_.spec(), from, k.data(), v.data());
    cuda::codes_from_canonical(spec_, k.data(), v.data(), to);
    std::memcpy(to + b.k_scales, from + a.k_scales, a.groups_k * 128);
    if (spec_.key.mean) std::memcpy(to + b.k_mean, from + a.k_mean, a.head_dim_k * 2);
    std::memcpy(to + b.v_scales, from + a.v_scales, a.groups_v * 128);
  }

  const scene::Scene& scene_;
  PageSpec spec_;
  DeviceBytes lambda_k_, lambda_v_;
  std::vector<Sequence> sequences_;
};

}  // namespace kv4::tests
