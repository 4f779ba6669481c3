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

// Random fp16 numbers.
inline std::vector<std::uint16_t> halves(cases::Random& random, std::size_t count) {
  std::vector<std::uint16_t> x(count);
  for (std::uint16_t& h : x) h = f32_to_f16(static_cast<float>(random.normal()));
  return x;
}

// Bytes on the device, with guards behind them. They are there when the constructor returns: streams that do not block
// know nothing of the default one, on which they are filled.
class DeviceBytes {
 public:
  DeviceBytes() = default;
  explicit DeviceBytes(std::size_t bytes, int fill = 0xff) : bytes_(bytes) {
    EXPECT_EQ(cudaMalloc(&data_, bytes + kGuardBytes), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, fill, bytes), cudaSuccess);
    EXPECT_EQ(cudaMemset(static_cast<std::byte*>(data_) + bytes, 0xff, kGuardBytes), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  }
  DeviceBytes(const void* from, std::size_t bytes) : DeviceBytes(bytes) {
    EXPECT_EQ(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
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
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::vector<std::uint8_t> read() const {
    std::vector<std::uint8_t> host(bytes_ + kGuardBytes);
    EXPECT_EQ(cudaMemcpy(host.data(), data_, host.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    EXPECT_TRUE(std::all_of(host.begin() + static_cast<std::ptrdiff_t>(bytes_), host.end(), [](std::uint8_t x) {
      return x == 0xff;
    })) << "written behind the end";
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
  spec.layout = kv4_make_page_layout(
      static_cast<std::uint32_t>(spec.key.dim), static_cast<std::uint32_t>(spec.value.dim),
      static_cast<std::uint32_t>(spec.key.groups), static_cast<std::uint32_t>(spec.value.groups), spec.key.mean,
      pad(spec.key.dim), pad(spec.value.dim), static_cast<std::uint32_t>(spec.key.levels.bits),
      static_cast<std::uint32_t>(spec.value.levels.bits));
  return spec;
}

// How a scene lies on the device: pages in one piece or in chunks of 2^chunk_shift, exact rows in one piece or in
// blocks.
struct Layout {
  int chunk_shift = -1;  // below 0: in one piece
  bool blocks = false;
};

class DeviceScene {
 public:
  explicit DeviceScene(const scene::Scene& s, const Layout& layout = {})
      : scene_(s), spec_(s.spec().key.rotation ? on_device(s.spec()) : PageSpec()) {
    const int heads = s.shape().kv_heads;
    if (s.shape().lambda) {
      lambda_k_ = DeviceBytes(s.lambda_k(0), static_cast<std::size_t>(heads * s.shape().dim_k) * 4);
      lambda_v_ = DeviceBytes(s.lambda_v(0), static_cast<std::size_t>(heads * s.shape().dim_v) * 4);
    }
    const std::vector<SequenceView> views = s.views(1);
    put_pages(views, layout.chunk_shift);
    sequences_.resize(views.size());
    for (std::size_t b = 0; b < views.size(); ++b) {
      Sequence& to = sequences_[b];
      const SequenceView& from = views[b];
      to.ids = DeviceBytes(std::vector<std::int32_t>(from.pages, from.pages + from.page_count));
      for (int set = 0; set < 2; ++set)
        if (from.exact[set].count > 0) put_rows(from.exact[set], layout.blocks, b % 2 == 0, to.rows[set]);
    }
  }
  std::vector<SequenceView> views(std::int64_t queries) const {
    std::vector<SequenceView> all = scene_.views(queries);
    for (std::size_t b = 0; b < all.size(); ++b) {
      all[b].pages = sequences_[b].ids.as<std::int32_t>();
      all[b].lambda_k = lambda_k_.as<float>();
      all[b].lambda_v = lambda_v_.as<float>();
      for (int set = 0; set < 2; ++set)
        if (all[b].exact[set].count > 0) all[b].exact[set] = sequences_[b].rows[set].view;
    }
    return all;
  }
  const PageSpec& spec() const { return spec_; }
  const PageMemory& pages() const { return pages_; }

 private:
  struct Rows {
    DeviceBytes k, v, blocks;
    ExactRows view;
  };
  struct Sequence {
    DeviceBytes ids;
    Rows rows[2];
  };

  void put_pages(const std::vector<SequenceView>& views, int chunk_shift) {
    std::int32_t count = 0;
    for (const SequenceView& v : views) count += v.page_count;
    pages_.head_stride = spec_.layout.head_bytes;
    pages_.page_stride = pages_.head_stride * scene_.shape().kv_heads + 64;
    const std::int32_t each = chunk_shift < 0 ? std::max(count, 1) : std::int32_t{1} << chunk_shift;
    std::vector<const void*> table;
    for (std::int32_t first = 0; first < count; first += each) {
      const std::int32_t behind = std::min(first + each, count);
      std::vector<std::uint8_t> bytes(static_cast<std::size_t>(pages_.page_stride * (behind - first)), 0xff);
      for (std::int32_t id = first; id < behind; ++id)
        for (int h = 0; h < scene_.shape().kv_heads; ++h)
          convert(slice_at(scene_.pages(), id, h),
                  bytes.data() + (id - first) * pages_.page_stride + h * pages_.head_stride);
      memory_.push_back(DeviceBytes(bytes));
      table.push_back(memory_.back().as());
    }
    if (count == 0) return;
    if (chunk_shift < 0) {
      pages_.data = memory_[0].as<std::uint8_t>();
      return;
    }
    chunks_ = DeviceBytes(table);
    pages_.chunks = chunks_.as<std::uint8_t* const>();
    pages_.chunk_shift = chunk_shift;
  }

  // Blocks of one sequence and set, their ids going down; rows 16 bytes apart, where `aligned`, in the others too.
  void put_rows(const ExactRows& from, bool blocks, bool aligned, Rows& to) const {
    const int heads = scene_.shape().kv_heads;
    const std::size_t size = size_of(scene_.shape().dtype);
    to.view = from;
    if (blocks) {
      const std::int64_t count = (from.count + kPageTokens - 1) / kPageTokens;
      std::vector<std::int32_t> ids;
      for (std::int64_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(count - i));
      to.view.blocks = ids.data();
      to.view.k_stride = scene_.shape().dim_k + (aligned ? 8 : 1);
      to.view.v_stride = scene_.shape().dim_v + (aligned ? 0 : 3);
      to.view.k_head_stride = to.view.k_stride * kPageTokens;
      to.view.v_head_stride = to.view.v_stride * (kPageTokens + 8);
      to.view.k_block_stride = to.view.k_head_stride * heads + 16;
      to.view.v_block_stride = to.view.v_head_stride * heads;
      for (const bool keys : {true, false}) {
        const int dim = keys ? scene_.shape().dim_k : scene_.shape().dim_v;
        std::vector<std::uint8_t> bytes(
            static_cast<std::size_t>((count + 1) * (keys ? to.view.k_block_stride : to.view.v_block_stride)) * size,
            0xff);
        for (int h = 0; h < heads; ++h)
          for (std::int64_t j = 0; j < from.count; ++j)
            std::memcpy(bytes.data() + static_cast<std::size_t>(row_offset(to.view, keys, h, j)) * size,
                        static_cast<const std::uint8_t*>(keys ? from.k : from.v) +
                            static_cast<std::size_t>(row_offset(from, keys, h, j)) * size,
                        static_cast<std::size_t>(dim) * size);
        (keys ? to.k : to.v) = DeviceBytes(bytes);
      }
      to.blocks = DeviceBytes(ids);
      to.view.blocks = to.blocks.as<std::int32_t>();
    } else {
      to.k = DeviceBytes(from.k, static_cast<std::size_t>(from.k_head_stride * heads) * size);
      to.v = DeviceBytes(from.v, static_cast<std::size_t>(from.v_head_stride * heads) * size);
    }
    to.view.k = to.k.as();
    to.view.v = to.v.as();
  }

  void convert(const std::uint8_t* from, std::uint8_t* to) const {
    const kv4_page_layout &a = scene_.spec().layout, &b = spec_.layout;
    const auto bytes = [](const SideSpec& side) { return static_cast<std::size_t>(8 * side.levels.bits * side.dim); };
    std::vector<std::uint8_t> k(bytes(spec_.key)), v(bytes(spec_.value));
    cpu::codes_to_canonical(scene_.spec(), from, k.data(), v.data());
    cuda::codes_from_canonical(spec_, k.data(), v.data(), to);
    std::memcpy(to + b.k_scales, from + a.k_scales, a.groups_k * 128);
    if (spec_.key.mean) std::memcpy(to + b.k_mean, from + a.k_mean, a.head_dim_k * 2);
    std::memcpy(to + b.v_scales, from + a.v_scales, a.groups_v * 128);
  }

  const scene::Scene& scene_;
  PageSpec spec_;
  PageMemory pages_;
  DeviceBytes lambda_k_, lambda_v_, chunks_;
  std::vector<DeviceBytes> memory_;
  std::vector<Sequence> sequences_;
};

}  // namespace kv4::tests
