// Sealing on a CUDA device against the float64 definition, by the CPU's rule of equality (seal_case.h): the test class.
#pragma once

#include <gtest/gtest.h>

#include <span>
#include <utility>
#include <vector>

#include "device.h"
#include "seal_cases.h"

namespace kv4::tests {

using namespace seal_case;

// The widths that a device takes, 4 bits among them.
struct Bits {
  int k, v;
};
inline constexpr Bits kEveryBits[] = {{4, 4}, {2, 3}, {3, 2}, {4, 2}, {3, 4}};
inline constexpr Bits kNarrowBits[] = {{2, 3}, {3, 2}, {4, 2}, {3, 4}, {2, 2}, {3, 3}};
// The case with codes of so many bits; other levels than lloyd_max have 4.
inline Case with_bits(Case c, const Bits& bits) {
  for (auto [side, b] : {std::pair(&c.key, bits.k), std::pair(&c.value, bits.v)}) {
    side->bits = b;
    if (b != 4) side->levels = LevelKind::lloyd_max;
  }
  return c;
}

// Nothing runs where there is no device.
class CudaSeal : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  }

  static PageMemory pages_at(const DeviceBytes& memory, const PageSpec& spec, int heads) {
    PageMemory pages;
    pages.data = memory.as<std::uint8_t>();
    pages.head_stride = spec.layout.head_bytes;
    pages.page_stride = pages.head_stride * heads;
    return pages;
  }
  static Status seal(const PageSpec& spec, const PageMemory& pages, std::span<const SealJob> jobs) {
    return cuda::backend()->seal(spec, pages, 1, jobs, false);
  }

  struct Device {
    DeviceBytes k, v, skip, lambda_k, lambda_v, slice;
    PageMemory pages;
    SealJob job;
    Device(const Inputs& in, const PageSpec& spec)
        : k(in.k->dtype == DType::f32 ? DeviceBytes(in.k->f32) : DeviceBytes(in.k->f16)),
          v(in.v->dtype == DType::f32 ? DeviceBytes(in.v->f32) : DeviceBytes(in.v->f16)), skip(in.skip),
          lambda_k(in.lambda_k), lambda_v(in.lambda_v), slice(spec.layout.head_bytes, 0) {
      pages = pages_at(slice, spec, 1);
      job = in.job();
      place(in, 0, kPageTokens);
    }
    void place(const Inputs& in, int first, int count) {
      const std::size_t size = size_of(in.k->dtype);
      job.k = k.as<std::byte>() + static_cast<std::size_t>(first * in.k->stride) * size;
      job.v = v.as<std::byte>() + static_cast<std::size_t>(first * in.v->stride) * size;
      job.skip = skip.as<std::uint8_t>() + first;
      job.lambda_k = in.lambda_k.empty() ? nullptr : lambda_k.as<float>();
      job.lambda_v = in.lambda_v.empty() ? nullptr : lambda_v.as<float>();
      job.first = static_cast<std::int16_t>(first);
      job.count = count;
    }
  };

  static Codes codes_of(const PageSpec& spec, const std::vector<std::uint8_t>& slice) {
    const auto canonical = [](const SideSpec& side) {
      return std::vector<std::uint8_t>(static_cast<std::size_t>(kPageTokens / 8 * side.levels.bits * side.dim));
    };
    std::vector<std::uint8_t> k = canonical(spec.key), v = canonical(spec.value);
    cuda::codes_to_canonical(spec, slice.data(), k.data(), v.data());
    return {reference::from_canonical(k.data(), kPageTokens, spec.key.dim, spec.key.levels.bits),
            reference::from_canonical(v.data(), kPageTokens, spec.value.dim, spec.value.levels.bits)};
  }

  static void check(const Case& c) {
    SCOPED_TRACE(testing::Message() << c);
    const Inputs in(c);
    const PageSpec spec = tests::on_device(in.spec);
    const Device device(in, spec);
    const Status status = seal(spec, device.pages, {&device.job, 1});
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<std::uint8_t> slice = device.slice.read();
    const Codes codes = codes_of(spec, slice);
    check_side(
        spec.key, *in.k, in.skip.data(), {in.lambda_k.begin(), in.lambda_k.end()}, codes.key,
        read_u16(slice.data() + spec.layout.k_scales, kPageTokens),
        in.spec.key.mean ? read_u16(slice.data() + spec.layout.k_mean, spec.key.dim) : std::vector<std::uint16_t>{});
    check_side(spec.value, *in.v, in.skip.data(), {in.lambda_v.begin(), in.lambda_v.end()}, codes.value,
               read_u16(slice.data() + spec.layout.v_scales, kPageTokens), {});
  }
};

}  // namespace kv4::tests
