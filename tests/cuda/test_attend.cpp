// Attention on a CUDA device against float64 attention over the dequantised cache, on the CPU's cases and within the
// CPU's bounds; at exact rows queries and weights are two 16-bit floats each, which the bounds add.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../cpp/attend_call.h"
#include "device.h"

namespace kv4 {
namespace {

using scene::Call;
using scene::Held;
using scene::Scene;
using scene::Shape;
using tests::DeviceBytes;
using tests::DeviceScene;

class CudaAttend : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  }

  struct Device {
    DeviceBytes q, start, window, sinks, mask;
    AttendArgs args;
    explicit Device(const Call& c) : q(c.q), start(c.start), window(c.window), sinks(c.sinks), mask(c.mask), args(c.args) {
      args.q.data = q.as();
      if (args.mask.start != nullptr) args.mask.start = start.as<std::int32_t>();
      if (args.mask.window != nullptr) args.mask.window = window.as<std::int32_t>();
      if (args.sinks != nullptr) args.sinks = sinks.as<float>();
      if (args.mask.general != nullptr) args.mask.general = mask.as();
    }
  };

  static AttendJob job_of(const Scene& s, const DeviceScene& d, const AttendArgs& args, const std::vector<SequenceView>& views) {
    AttendJob job = s.job(args, views);
    if (job.spec != nullptr) job.spec = &d.spec();
    return job;
  }

  static double element(const std::uint8_t* at, DType dtype) {
    if (dtype == DType::f32) {
      float f;
      std::memcpy(&f, at, 4);
      return f;
    }
    std::uint16_t h;
    std::memcpy(&h, at, 2);
    return dtype == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
  }

  // Output of one call: physically [batch, T, heads, dim_v + 2], the gap guarded.
  static std::vector<double> run(const Scene& s, const Call& call, Status* status) {
    const DeviceScene scene(s);
    const Device device(call);
    const std::int64_t heads = call.args.q.shape[1], queries = call.args.q.shape[2], dv = s.shape().dim_v;
    const std::int64_t width = dv + 2, size = static_cast<std::int64_t>(size_of(call.out_dtype));
    const DeviceBytes buffer(static_cast<std::size_t>(s.batch() * queries * heads * width * size));
    const std::vector<SequenceView> views = scene.views(queries);
    AttendJob job = job_of(s, scene, device.args, views);
    job.out.data = buffer.as();
    job.out.dtype = call.out_dtype;
    job.out.shape = {s.batch(), heads, queries, dv};
    job.out.stride = {queries * heads * width, width, heads * width, 1};
    *status = cuda::backend()->attend(job);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<std::uint8_t> host = buffer.read();
    std::vector<double> out;
    for (std::int64_t b = 0; b < s.batch(); ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t t = 0; t < queries; ++t) {
          const std::uint8_t* row = host.data() + (b * job.out.stride[0] + h * width + t * heads * width) * size;
          for (std::int64_t c = 0; c < dv; ++c) out.push_back(element(row + c * size, call.out_dtype));
          for (std::int64_t i = dv * size; i < width * size; ++i) EXPECT_EQ(row[i], 0xff);
        }
    return out;
  }

  static void check(const Scene& s, const Call& call) {
    const std::vector<reference::DenseTokens> dense = s.dense();
    std::vector<std::int64_t> position;
    for (int b = 0; b < s.batch(); ++b) position.push_back(s.length(b) - call.args.q.shape[2]);
    const reference::Attention expected = reference::attend(call.args, s.shape().kv_heads, s.shape().dim_v, dense, position);
    // Two halves leave the last bit of the second: 2 * 8 bits of bfloat16, 2 * 11 of float16 but for its range.
    const bool bf16 = s.shape().dtype == DType::bf16;
    const double half_unit = bf16 ? 0x1p-17 : 0x1p-22;
    const scene::ExactRounding exact{call.args.q.dtype == s.shape().dtype ? 0 : half_unit, half_unit};
    const std::vector<double> bound = scene::bounds(s, call, dense, expected, exact);
    Status status;
    const std::vector<double> out = run(s, call, &status);
    ASSERT_TRUE(status.ok()) << status.message();
    scene::expect_within(s, call, out, expected, bound);
  }
};

constexpr DType kHalves[] = {DType::f16, DType::bf16};

TEST_F(CudaAttend, EveryHeadDimAndGroup) {
  std::uint64_t seed = 1;
  for (int d : cases::kHeadDims) {
    for (int group : {1, 2, 3, 4, 6, 7, 8, 9, 12, 16}) {
      SCOPED_TRACE("head_dim " + std::to_string(d) + ", group " + std::to_string(group));
      Shape shape;
      shape.dim_k = shape.dim_v = d;
      shape.group = group;
      shape.kv_heads = 1 + static_cast<int>(seed % 2);
      shape.dtype = kHalves[seed % 2];
      shape.seed = seed++;
      const Scene s(shape, {Held::of(200)});
      const Call call(s, 1, static_cast<DType>(seed % 3));
      check(s, call);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaAttend, EveryTokenCount) { scene::every_token_count(check); }

TEST_F(CudaAttend, OnlyPagesAndAPartOfOne) {
  std::uint64_t seed = 2000;
  for (int tokens : {1, 17, 63, 64, 65, 130, 640, 1000}) {
    Shape shape;
    shape.dim_k = shape.dim_v = seed % 2 == 0 ? 96 : 128;
    shape.group = 3;
    shape.mean = seed % 3 != 0;
    shape.levels = seed % 3 == 1 ? LevelKind::uniform : LevelKind::lloyd_max;
    shape.lambda = seed % 4 != 2;
    shape.seed = seed++;
    SCOPED_TRACE(tokens);
    const Scene s(shape, {Held{0, tokens, 0, 0}});
    const Call call(s, 1);
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaAttend, ManyQueries) {
  std::uint64_t seed = 3000;
  for (int queries : {2, 5, 9, 33, 64}) {
    for (int group : {1, 4, 6}) {
      Shape shape;
      shape.dim_k = shape.dim_v = seed % 3 == 0 ? 256 : 128;
      shape.group = group;
      shape.dtype = kHalves[seed % 2];
      shape.seed = seed++;
      SCOPED_TRACE(std::to_string(queries) + " queries, group " + std::to_string(group));
      const Scene s(shape, {Held{4, 320, 90, 0}});
      const Call call(s, queries, shape.dtype);
      check(s, call);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaAttend, RaggedBatchWithStartsAndWindows) {
  std::uint64_t seed = 4000;
  for (int queries : {1, 7}) {
    Shape shape;
    shape.group = 4;
    shape.seed = seed++;
    const Scene s(shape, {Held{4, 640, 70, 0}, Held{0, 0, 40, 3}, Held{4, 128, 127, 20}, Held{2, 0, 9, 0}, Held{0, 2048, 64, 0}});
    Call call(s, queries);
    call.starts({5, 10, 25, 0, 100});
    call.windows({200, 0, 64, 4, 1000});
    call.with_sinks();
    check(s, call);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaAttend, GeneralMasksAndSoftcap) {
  std::uint64_t seed = 5000;
  for (Mask::General kind : {Mask::General::boolean, Mask::General::additive}) {
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      if (kind == Mask::General::boolean && dtype != DType::f32) continue;
      for (bool wide : {false, true}) {
        Shape shape;
        shape.group = 3;
        shape.seed = seed++;
        const Scene s(shape, {Held{4, 200, 50, 0}, Held{4, 64, 66, 30}});
        Call call(s, 3);
        call.general(kind, dtype, 254, wide, wide);
        call.args.softcap = wide ? 3.0f : 0.0f;
        call.args.scale = 0.2f;
        check(s, call);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The mean adds hundreds to every score of a page; the softmax must not notice.
TEST_F(CudaAttend, LargeMeans) {
  Shape shape;
  shape.bias = 30;
  shape.group = 6;
  shape.seed = 77;
  const Scene s(shape, {Held{4, 1024, 64, 0}});
  const Call call(s, 1);
  check(s, call);
}

TEST_F(CudaAttend, PartialStatesMergeToTheWhole) {
  Shape shape;
  shape.group = 4;
  shape.seed = 88;
  const Scene s(shape, {Held{4, 640, 70, 0}, Held{4, 64, 100, 0}});
  const Call call(s, 3);
  const DeviceScene scene(s);
  const Device device(call);
  const std::vector<SequenceView> views = scene.views(3);
  const std::int64_t rows = s.batch() * call.args.q.shape[1] * 3;
  Status status;
  const std::vector<double> whole = run(s, call, &status);
  ASSERT_TRUE(status.ok());
  // Pages in one call, exact rows in another.
  std::vector<float> o[2], m[2], l[2];
  for (int part = 0; part < 2; ++part) {
    std::vector<SequenceView> some = views;
    for (SequenceView& v : some) {
      if (part == 0) v.exact[0].count = v.exact[1].count = 0;
      else v.page_count = 0;
    }
    const DeviceBytes od(static_cast<std::size_t>(rows * 128 * 4)), md(static_cast<std::size_t>(rows * 4)), ld(static_cast<std::size_t>(rows * 4));
    AttendJob job = job_of(s, scene, device.args, some);
    job.partial = {od.as<float>(), md.as<float>(), ld.as<float>()};
    ASSERT_TRUE(cuda::backend()->attend(job).ok());
    const auto floats = [](const DeviceBytes& d) {
      const std::vector<std::uint8_t> bytes = d.read();
      std::vector<float> x(bytes.size() / 4);
      std::memcpy(x.data(), bytes.data(), bytes.size());
      return x;
    };
    o[part] = floats(od);
    m[part] = floats(md);
    l[part] = floats(ld);
  }
  const PartialState into{o[0].data(), m[0].data(), l[0].data()};
  merge(into, {o[1].data(), m[1].data(), l[1].data()}, rows, 128);
  for (std::int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < 128; ++c)
      ASSERT_NEAR(o[0][static_cast<std::size_t>(r * 128 + c)] / l[0][static_cast<std::size_t>(r)], whole[static_cast<std::size_t>(r * 128 + c)], 1e-4)
          << r << " " << c;
}

TEST_F(CudaAttend, RefusalsSayWhy) {
  Shape shape;
  shape.dtype = DType::f32;
  const Scene s(shape, {Held{4, 64, 10, 0}});
  const Call call(s, 1);
  Status status;
  run(s, call, &status);
  EXPECT_EQ(status.code(), StatusCode::unsupported);
  EXPECT_EQ(status.message(), "dtype: expected float16 or bfloat16 on CUDA; got float32");
  shape.dtype = DType::f16;
  shape.dim_k = shape.dim_v = 112;
  const Scene odd(shape, {Held{0, 64, 0, 0}});
  const Call odd_call(odd, 1);
  run(odd, odd_call, &status);
  EXPECT_EQ(status.message(), "head_dim_k: expected 64, 80, 96, 128 or 256 on CUDA; got 112");
}

}  // namespace
}  // namespace kv4
