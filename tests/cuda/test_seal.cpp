// Sealing and dequantising on a CUDA device against the float64 definition (seal_device.h).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "seal_device.h"

namespace kv4 {
namespace {

using namespace seal_case;
using tests::CudaSeal;
using tests::DeviceBytes;

TEST_F(CudaSeal, MatchesReference) { every_dim_and_rotation(1, check); }
TEST_F(CudaSeal, LargeKeyBias) { large_key_bias(check); }

TEST_F(CudaSeal, NarrowCodesMatchReference) {
  int n = 0;
  every_dim_and_rotation(1, [&](const Case& c) { check(with_bits(c, tests::kNarrowBits[n++ % 6])); });
}

// A page filled in parts holds what one filled at once does.
TEST_F(CudaSeal, PartsOfAPage) {
  for (const tests::Bits& bits : tests::kEveryBits) {
    for (const DType dtype : {DType::bf16, DType::f32}) {
      for (int d : cases::kHeadDims) {
        Case c;
        c.key.dim = c.value.dim = d;
        c.key.mean = false;
        c.dtype = dtype;
        c = with_bits(c, bits);
        SCOPED_TRACE(testing::Message() << c);
        const Inputs in(c);
        const PageSpec spec = tests::on_device(in.spec);
        Device whole(in, spec), parts(in, spec);
        ASSERT_TRUE(seal(spec, whole.pages, {&whole.job, 1}).ok());
        int first = 0;
        for (int count : {1, 6, 25, 32}) {
          parts.place(in, first, count);
          ASSERT_TRUE(seal(spec, parts.pages, {&parts.job, 1}).ok());
          first += count;
        }
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        ASSERT_EQ(whole.slice.read(), parts.slice.read());
      }
    }
  }
}

// More pages than the device seals at once hold what each holds that is sealed alone: means, weights and masks
// included.
TEST_F(CudaSeal, PagesTogether) {
  for (const auto& [d, bits] :
       {std::pair(80, tests::Bits{4, 4}), std::pair(128, tests::Bits{4, 4}), std::pair(64, tests::Bits{3, 4}),
        std::pair(128, tests::Bits{2, 3}), std::pair(256, tests::Bits{3, 2})}) {
    Case c;
    c.key = {d, RotationKind::srft, 0, LevelKind::lloyd_max, ScaleRule::least_squares, true, true};
    c.value = {d, RotationKind::srht, 0, LevelKind::uniform, ScaleRule::least_squares, false, false};
    c.dtype = DType::f16;
    c.masked = true;
    c = with_bits(c, bits);
    const Inputs in(c);
    const PageSpec spec = tests::on_device(in.spec);
    const Device device(in, spec);
    constexpr int kDistinct = 8;  // windows of the same rows
    constexpr std::size_t kJobs = 700;
    // Twice the rows; once with their gaps between, once without, which is read 16 bytes at a time.
    const auto twice = [d](const Rows& rows, std::int64_t stride) {
      std::vector<std::uint16_t> all;
      for (int j = 0; j < 2 * kPageTokens; ++j) {
        const auto row = rows.f16.begin() + j % kPageTokens * rows.stride;
        all.insert(all.end(), row, row + d);
        all.resize(static_cast<std::size_t>((j + 1) * stride), 0x7fff);
      }
      return all;
    };
    std::vector<std::uint8_t> skip = in.skip;
    skip.insert(skip.end(), in.skip.begin(), in.skip.end());
    const DeviceBytes k(twice(*in.k, in.k->stride)), v(twice(*in.v, in.v->stride)), dense_k(twice(*in.k, d)),
        dense_v(twice(*in.v, d)), mask(skip);
    const std::size_t bytes = spec.layout.head_bytes;
    const DeviceBytes alone(bytes * kDistinct, 0), together(bytes * kJobs, 0);
    const auto job = [&](std::size_t i, bool dense) {
      SealJob j = device.job;
      if (dense) j.k_stride = j.v_stride = d;
      const std::size_t from = i % kDistinct * 5;
      j.k = (dense ? dense_k : k).as<std::uint16_t>() + from * static_cast<std::size_t>(j.k_stride);
      j.v = (dense ? dense_v : v).as<std::uint16_t>() + from * static_cast<std::size_t>(j.v_stride);
      j.skip = mask.as<std::uint8_t>() + from;
      j.page = static_cast<std::int32_t>(i);
      return j;
    };
    for (std::size_t i = 0; i < kDistinct; ++i) {
      const SealJob one = job(i, false);
      ASSERT_TRUE(seal(spec, pages_at(alone, spec, 1), {&one, 1}).ok());
    }
    std::vector<SealJob> jobs;
    for (std::size_t i = 0; i < kJobs; ++i) jobs.push_back(job(i, true));
    ASSERT_TRUE(seal(spec, pages_at(together, spec, 1), jobs).ok());
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<std::uint8_t> expected = alone.read(), got = together.read();
    for (std::size_t i = 0; i < kJobs; ++i)
      ASSERT_EQ(std::memcmp(got.data() + i * bytes, expected.data() + i % kDistinct * bytes, bytes), 0)
          << c << ", page " << i;
    EXPECT_NE(std::memcmp(expected.data(), expected.data() + bytes, bytes), 0);
  }
}

TEST_F(CudaSeal, DequantisesAsDefined) {
  constexpr int kWidths = std::ssize(tests::kEveryBits);
  for (int i = 0; i < 2 * std::ssize(cases::kHeadDims) * kWidths; ++i) {
    const bool rotated = i / kWidths % 2 == 0;
    const int d = cases::kHeadDims[i / kWidths / 2];
    Case c;
    c.key = {d,
             rotated ? RotationKind::srft : RotationKind::identity,
             0,
             LevelKind::lloyd_max,
             ScaleRule::least_squares,
             true,
             true};
    c.value = {
        d,   rotated ? RotationKind::srht : RotationKind::identity, 0, LevelKind::uniform, ScaleRule::abs_max, false,
        true};
    c.dtype = DType::f16;
    c = with_bits(c, tests::kEveryBits[i % kWidths]);
    SCOPED_TRACE(testing::Message() << c);
    const Inputs in(c);
    const PageSpec spec = tests::on_device(in.spec);
    const Device device(in, spec);
    ASSERT_TRUE(seal(spec, device.pages, {&device.job, 1}).ok());
    const int first = 5, count = 51;
    const DeviceBytes k(static_cast<std::size_t>(count * d * 4)), v(static_cast<std::size_t>(count * d * 4));
    DequantiseJob job;
    job.first = first;
    job.count = count;
    job.lambda_k = device.job.lambda_k;
    job.lambda_v = device.job.lambda_v;
    job.k = k.as<float>();
    job.v = v.as<float>();
    job.k_stride = job.v_stride = d;
    ASSERT_TRUE(cuda::backend()->dequantise(spec, device.pages, 1, {&job, 1}, false).ok());
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<std::uint8_t> slice = device.slice.read();
    const Codes codes = codes_of(spec, slice);
    for (int side = 0; side < 2; ++side) {
      const SideSpec& s = side == 0 ? spec.key : spec.value;
      const std::vector<std::uint16_t> scales =
          read_u16(slice.data() + (side == 0 ? spec.layout.k_scales : spec.layout.v_scales), kPageTokens);
      const std::vector<std::uint16_t> mean = read_u16(slice.data() + spec.layout.k_mean, d);
      const std::vector<float>& weights = side == 0 ? in.lambda_k : in.lambda_v;
      const std::vector<double> lambda(weights.begin(), weights.end());
      const std::vector<double> expected = reference::dequantise(s, side == 0 ? codes.key.data() : codes.value.data(),
                                                                 scales.data(), side == 0 ? mean.data() : nullptr,
                                                                 kPageTokens, lambda.data());
      const std::vector<std::uint8_t> bytes = side == 0 ? k.read() : v.read();
      for (int j = 0; j < count; ++j) {
        double norm = 0;
        for (int i = 0; i < d; ++i)
          norm += std::pow(
              expected[static_cast<std::size_t>((first + j) * d + i)] * lambda[static_cast<std::size_t>(i)], 2);
        for (int i = 0; i < d; ++i) {
          float got;
          std::memcpy(&got, bytes.data() + (static_cast<std::size_t>(j) * d + i) * 4, 4);
          // A sum of d products in float; their magnitudes sum to at most the row's norm, the matrix being orthonormal.
          ASSERT_NEAR(got, expected[static_cast<std::size_t>((first + j) * d + i)],
                      d * 0x1p-24 * std::sqrt(norm) / lambda[static_cast<std::size_t>(i)])
              << "d " << d << " side " << side << " token " << first + j << " channel " << i;
        }
      }
    }
  }
}

// More pages than a CTA takes at a time, several heads and parts of pages, in 16 bits, with rows that are stored four
// elements at a time and ones that cannot be: the numbers of one page's float32 rows, and nothing beside them.
TEST_F(CudaSeal, DequantisesPagesTogether) {
  for (const auto& [d, key, value, bits] :
       {std::tuple(80, RotationKind::srft, RotationKind::identity, tests::Bits{4, 4}),
        std::tuple(128, RotationKind::identity, RotationKind::srht, tests::Bits{4, 4}),
        std::tuple(256, RotationKind::srft, RotationKind::srht, tests::Bits{4, 4}),
        std::tuple(64, RotationKind::srht, RotationKind::srft, tests::Bits{4, 4}),
        std::tuple(128, RotationKind::srht, RotationKind::srft, tests::Bits{3, 2}),
        std::tuple(96, RotationKind::srft, RotationKind::srht, tests::Bits{2, 3})}) {
    SCOPED_TRACE(testing::Message() << "d " << d);
    constexpr int kDistinct = 6, kHeads = 2, kJobs = 900;
    Case c;
    c.key = {d, key, 0, LevelKind::lloyd_max, ScaleRule::least_squares, true, true};
    c.value = {d, value, 0, LevelKind::uniform, ScaleRule::least_squares, false, true};
    c.dtype = DType::f16;
    c = with_bits(c, bits);
    const PageSpec spec = tests::on_device(Inputs(c).spec);
    const std::size_t slice_bytes = spec.layout.head_bytes, width = static_cast<std::size_t>(d),
                      rows = kHeads * kPageTokens * width;
    // Slices of kDistinct pages, each sealed from the case's rows with the last ones masked.
    const Inputs in(c);
    const Device device(in, spec);
    const DeviceBytes memory(slice_bytes * kHeads * kDistinct, 0);
    PageMemory slices = pages_at(memory, spec, 1);
    std::vector<std::uint8_t> skips(static_cast<std::size_t>(kDistinct * kHeads * kPageTokens));
    for (std::size_t i = 0; i < skips.size(); ++i) skips[i] = i % kPageTokens >= 40 + i / kPageTokens;
    const DeviceBytes skip(skips);
    for (int i = 0; i < kDistinct * kHeads; ++i) {
      SealJob job = device.job;
      job.page = i;
      job.skip = skip.as<std::uint8_t>() + i * kPageTokens;
      ASSERT_TRUE(seal(spec, slices, {&job, 1}).ok());
    }
    std::vector<float> weights = cases::normal_rows(kHeads, d, 5, 0.2);
    for (float& w : weights) w += 1;
    const DeviceBytes lambda(weights);
    const PageMemory pages = pages_at(memory, spec, kHeads);
    const auto job_of = [&](std::int32_t page, int first, int count, DType dtype, std::byte* k, std::byte* v,
                            std::int64_t stride) {
      DequantiseJob job;
      job.page = page;
      job.dtype = dtype;
      job.first = static_cast<std::int16_t>(first);
      job.count = count;
      job.lambda_k = job.lambda_v = lambda.as<float>();
      job.k = k;
      job.v = v;
      job.k_stride = job.v_stride = stride;
      job.k_head_stride = job.v_head_stride = kPageTokens * stride;
      return job;
    };
    const auto run = [&](std::span<const DequantiseJob> jobs) {
      return cuda::backend()->dequantise(spec, pages, kHeads, jobs, false).ok() &&
             cudaDeviceSynchronize() == cudaSuccess;
    };
    std::vector<std::vector<std::uint8_t>> expected[2];
    for (int i = 0; i < kDistinct; ++i) {
      const DeviceBytes k(rows * 4), v(rows * 4);
      const DequantiseJob job = job_of(i, 0, kPageTokens, DType::f32, k.as<std::byte>(), v.as<std::byte>(), d);
      ASSERT_TRUE(run({&job, 1}));
      expected[0].push_back(k.read());
      expected[1].push_back(v.read());
    }
    for (const auto& [dtype, stride] :
         {std::pair(DType::f16, d + 8), std::pair(DType::bf16, d), std::pair(DType::bf16, d + 3),
          std::pair(DType::f32, d), std::pair(DType::f32, d + 1)}) {
      SCOPED_TRACE(testing::Message() << "dtype " << static_cast<int>(dtype) << " stride " << stride);
      const std::size_t size = size_of(dtype), of_job = kHeads * kPageTokens * static_cast<std::size_t>(stride) * size;
      const DeviceBytes out[2] = {DeviceBytes(of_job * kJobs), DeviceBytes(of_job * kJobs)};
      std::vector<DequantiseJob> jobs;
      for (int i = 0; i < kJobs; ++i) {
        const int first = i % 5 * 7, count = i % 3 == 0 ? kPageTokens - first : 1 + i % 29;
        const std::size_t at = static_cast<std::size_t>(i) * of_job;
        // Some are for one side alone, or for none.
        jobs.push_back(job_of(i % 11 == 0 ? -1 : i % kDistinct, first, count, dtype,
                              i % 7 == 0 ? nullptr : out[0].as<std::byte>() + at,
                              i % 13 == 0 ? nullptr : out[1].as<std::byte>() + at, stride));
      }
      ASSERT_TRUE(run(jobs));
      for (int side = 0; side < 2; ++side) {
        const std::vector<std::uint8_t> got = out[side].read();
        for (int i = 0; i < kJobs; ++i) {
          const DequantiseJob& job = jobs[static_cast<std::size_t>(i)];
          const bool wanted = job.page >= 0 && (side == 0 ? job.k : job.v) != nullptr;
          std::vector<std::uint8_t> its(
              got.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(i) * of_job),
              got.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(i + 1) * of_job));
          for (int j = 0; wanted && j < kHeads * job.count; ++j) {
            const std::size_t head = static_cast<std::size_t>(j / job.count),
                              row = static_cast<std::size_t>(j % job.count);
            std::vector<float> x(width);
            std::memcpy(x.data(),
                        expected[side][static_cast<std::size_t>(job.page)].data() +
                            (head * kPageTokens + static_cast<std::size_t>(job.first) + row) * width * 4,
                        width * 4);
            double norm = 0;
            for (std::size_t e = 0; e < width; ++e) norm += std::pow(x[e] * weights[head * width + e], 2);
            for (std::size_t e = 0; e < width; ++e) {
              std::uint8_t* const at = its.data() +
                                       ((head * kPageTokens + row) * static_cast<std::size_t>(stride) + e) * size;
              float value;
              std::uint16_t half;
              std::memcpy(&half, at, 2);
              if (dtype == DType::f32) std::memcpy(&value, at, 4);
              else value = dtype == DType::f16 ? f16_to_f32(half) : bf16_to_f32(half);
              // One digit of the matrix: entries of at most sqrt(2 / d), wrong by at most their 2^-11; then rounding.
              const double digit = std::sqrt(2 * norm) * 0x1p-11 / weights[head * width + e],
                           rounding = std::fabs(x[e]) * (dtype == DType::f16 ? 0x1p-10 : 0x1p-8);
              if (dtype == DType::f32) ASSERT_EQ(value, x[e]);
              else ASSERT_NEAR(value, x[e], digit + rounding) << "side " << side << " job " << i << " row " << j;
              std::memset(at, 0xff, size);
            }
          }
          ASSERT_TRUE(std::all_of(its.begin(), its.end(), [](std::uint8_t x) { return x == 0xff; }))
              << "written beside: side " << side << " job " << i;
        }
      }
    }
  }
}

// The device's order of codes is a permutation of the canonical one, tested without a device.
TEST(CudaOrder, RoundTrips) {
  for (const tests::Bits& bits : tests::kEveryBits) {
    for (int d : cases::kHeadDims) {
      Case c;
      c.key.dim = c.value.dim = d;
      c.key.mean = true;
      c = with_bits(c, bits);
      SCOPED_TRACE(testing::Message() << c);
      const PageSpec spec = tests::on_device(make_page(c.key, c.value));
      cases::Random random(static_cast<std::uint64_t>(d));
      std::vector<std::uint8_t> k(static_cast<std::size_t>(8 * bits.k * d)),
          v(static_cast<std::size_t>(8 * bits.v * d)), k2(k.size()), v2(v.size()), slice(spec.layout.head_bytes);
      for (auto& x : k) x = static_cast<std::uint8_t>(random.bits());
      for (auto& x : v) x = static_cast<std::uint8_t>(random.bits());
      cuda::codes_from_canonical(spec, k.data(), v.data(), slice.data());
      cuda::codes_to_canonical(spec, slice.data(), k2.data(), v2.data());
      EXPECT_EQ(k, k2);
      EXPECT_EQ(v, v2);
    }
  }
}

TEST(CudaOrder, TablesGiveEveryLevel) {
  for (LevelKind kind : {LevelKind::lloyd_max, LevelKind::uniform}) {
    const cuda::Tables t = cuda::make_tables(levels(kind).table.data());
    for (std::uint32_t code = 0; code < 16; ++code) {
      const std::uint32_t stored = cuda::to_stored(code), index = stored & 7;
      EXPECT_EQ(cuda::from_stored(stored), code);
      const std::uint32_t* table = stored < 8 ? t.positive : t.negative;
      const int size = static_cast<int>(table[index / 4] >> index % 4 * 8 & 255);
      EXPECT_LT(size, 128) << "the look-up spreads a byte's sign: it must be 0";
      EXPECT_EQ(stored < 8 ? size : -size, levels(kind).table[code]) << code;
    }
  }
  for (int bits : {2, 3}) {
    const Levels& narrow = levels(LevelKind::lloyd_max, bits);
    const cuda::Tables t = cuda::make_narrow_tables(narrow.table.data(), bits);
    const auto half = static_cast<std::uint32_t>(narrow.half());
    for (std::uint32_t code = 0; code < 2 * half; ++code) {
      const std::uint32_t stored = cuda::to_stored(code, half);
      EXPECT_EQ(cuda::from_stored(stored, half), code);
      EXPECT_EQ(stored >= half, narrow.table[code] < 0) << "the highest bit is the sign";
      EXPECT_EQ(static_cast<std::int8_t>(t.positive[stored / 4] >> stored % 4 * 8), narrow.table[code]) << code;
    }
  }
}

}  // namespace
}  // namespace kv4
