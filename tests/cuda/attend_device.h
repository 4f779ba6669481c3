// Attention on a CUDA device against float64 attention over the dequantised cache: the test class, for the cases of
// attend_cases.h and others. At exact rows queries and weights are two 16-bit floats each, and weights of pages have 8
// bits where warps read more than 4 rows, which the bounds add.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "attend_cases.h"
#include "cuda/attend.h"
#include "device.h"

namespace kv4::tests {

using scene::Call;
using scene::Scene;

inline constexpr DType kHalves[] = {DType::f16, DType::bf16};

// Nothing runs where there is no device.
class CudaAttend : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  }

  struct Device {
    DeviceBytes q, start, window, sinks, mask;
    AttendArgs args;
    explicit Device(const Call& c)
        : q(c.q), start(c.start), window(c.window), sinks(c.sinks), mask(c.mask), args(c.args) {
      args.q.data = q.as();
      if (args.mask.start != nullptr) args.mask.start = start.as<std::int32_t>();
      if (args.mask.window != nullptr) args.mask.window = window.as<std::int32_t>();
      if (args.sinks != nullptr) args.sinks = sinks.as<float>();
      if (args.mask.general != nullptr) args.mask.general = mask.as();
    }
  };

  static AttendJob job_of(const Scene& s, const DeviceScene& d, const AttendArgs& args,
                          const std::vector<SequenceView>& views) {
    AttendJob job = s.job(args, views);
    if (job.spec != nullptr) job.spec = &d.spec();
    job.pages = d.pages();
    return job;
  }

  // A call's kernels: one wherever its segments are few enough, read by teams or by warps; three; with tiles of many
  // rows where a device has them and rows are many. As if sequences were as long as `load` says.
  struct Way {
    const char* name;
    cuda::Load load;
    bool tiles;
  };
  static constexpr Way kTeams = {"one kernel, teams", {0, 0}, false},
                       kWarps = {"one kernel, warps", {1ll << 30, 1ll << 40}, false},
                       kThree = {"three kernels", {1ll << 30, 0}, false}, kTiles = {"tiles", {1ll << 30, 0}, true};

  // `plan`: what was planned.
  static Status launch(const AttendJob& job, const Way& way, cuda::AttendPlan* planned = nullptr) {
    cuda::AttendParams p;
    KV4_RETURN_IF_ERROR(cuda::attend_params(job, &p));
    const DeviceBytes device_views(job.sequences.views.data(), job.sequences.views.size_bytes());
    p.sequences = device_views.as<SequenceView>();
    cuda::Chip chip = cuda::chip_of(0);
    chip.wgmma = chip.wgmma && way.tiles;
    const cuda::AttendPlan plan = cuda::plan_attend(p, chip, way.load);
    if (planned != nullptr) *planned = plan;
    EXPECT_LE(plan.scratch, cuda::backend()->attend_workspace(job));
    const DeviceBytes scratch(plan.scratch, 0xff);
    EXPECT_EQ(cudaMemset(scratch.as(), 0, cuda::kMostFused * sizeof(int)), cudaSuccess);
    // Twice: the first call leaves the scratch as the second needs it.
    for (int i = 0; i < 2; ++i) EXPECT_EQ(cuda::launch_attend(p, plan, scratch.as(), nullptr), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    scratch.read();
    return {};
  }

  // How a call is made: where its memory lies, and how many of the newest queries each sequence has, where not all of
  // the call's.
  struct How {
    Way way;
    Layout layout;
    std::vector<int> queries;
  };

  // Output of one call: physically [batch, T, heads, dim_v + 2], the gap guarded, and rows of queries that a sequence
  // does not have, which come as 0.
  static std::vector<double> run(const Scene& s, const Call& call, const How& how, Status* status,
                                 cuda::AttendPlan* planned = nullptr) {
    const DeviceScene scene(s, how.layout);
    const Device device(call);
    const std::int64_t heads = call.args.q.shape[1], queries = call.args.q.shape[2], dv = s.shape().dim_v;
    const std::int64_t width = dv + 2, size = static_cast<std::int64_t>(size_of(call.out_dtype));
    const DeviceBytes buffer(static_cast<std::size_t>(s.batch() * queries * heads * width * size));
    std::vector<SequenceView> views = scene.views(queries);
    const auto first_query = [&](std::int64_t b) {
      return how.queries.empty() ? 0 : queries - how.queries[static_cast<std::size_t>(b)];
    };
    for (SequenceView& v : views) {
      v.input_row = first_query(v.input);
      v.query_position += v.input_row;
      v.query_count -= v.input_row;
    }
    AttendJob job = job_of(s, scene, device.args, views);
    job.out.data = buffer.as();
    job.out.dtype = call.out_dtype;
    job.out.shape = {s.batch(), heads, queries, dv};
    job.out.stride = {queries * heads * width, width, heads * width, 1};
    *status = launch(job, how.way, planned);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<std::uint8_t> host = buffer.read();
    std::vector<double> out;
    for (std::int64_t b = 0; b < s.batch(); ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t t = 0; t < queries; ++t) {
          const std::uint8_t* row = host.data() + (b * job.out.stride[0] + h * width + t * heads * width) * size;
          const bool there = t >= first_query(b);
          for (std::int64_t c = 0; c < dv; ++c)
            out.push_back(there ? scene::element(row + c * size, call.out_dtype) : 0.0);
          for (std::int64_t i = there ? dv * size : 0; i < width * size; ++i) EXPECT_EQ(row[i], 0xff);
        }
    return out;
  }

  static void check(const Scene& s, const Call& call) { check_with(s, call, {}, {}); }
  static void check_with(const Scene& s, const Call& call, const Layout& layout, const std::vector<int>& queries) {
    const std::vector<reference::DenseTokens> dense = s.dense();
    std::vector<std::int64_t> position;
    for (int b = 0; b < s.batch(); ++b) position.push_back(s.length(b) - call.args.q.shape[2]);
    reference::Attention expected = reference::attend(call.args, s.shape().kv_heads, s.shape().dim_v, dense, position);
    // Two halves leave the last bit of the second: 2 * 8 bits of bfloat16, 2 * 11 of float16 but for its range.
    const bool bf16 = s.shape().dtype == DType::bf16;
    const double half_unit = bf16 ? 0x1p-17 : 0x1p-22;
    scene::Rounding rounds{call.args.q.dtype == s.shape().dtype ? 0 : half_unit, half_unit};
    const std::vector<double> fine = scene::bounds(s, call, dense, expected, rounds);
    rounds.page_weights = 255;
    const bool many_rows = s.shape().group * call.args.q.shape[2] > 4;
    const std::vector<double> coarse = many_rows ? scene::bounds(s, call, dense, expected, rounds) : fine;
    for (std::size_t b = 0; b < queries.size(); ++b)
      for (std::int64_t h = 0; h < call.args.q.shape[1]; ++h) {
        const std::int64_t row = (static_cast<std::int64_t>(b) * call.args.q.shape[1] + h) * call.args.q.shape[2];
        const auto from = expected.out.begin() + row * s.shape().dim_v;
        std::fill(from, from + (call.args.q.shape[2] - queries[b]) * s.shape().dim_v, 0.0);
      }
    // Tiles have queries and weights in 16-bit floats, of 11 bits; sequences with few rows are read by warps.
    rounds = {rounds.query, rounds.weight, 1024, 32512, 0x1p-11};
    std::vector<double> of_tiles = scene::bounds(s, call, dense, expected, rounds);
    for (std::size_t i = 0; i < of_tiles.size(); ++i) of_tiles[i] = std::max(of_tiles[i], coarse[i]);
    for (const Way& way : {kTeams, kWarps, kThree, kTiles}) {
      SCOPED_TRACE(way.name);
      Status status;
      cuda::AttendPlan plan;
      const std::vector<double> out = run(s, call, {way, layout, queries}, &status, &plan);
      if (way.tiles && plan.wide_splits == 0) continue;  // three kernels again
      ASSERT_TRUE(status.ok()) << status.message();
      scene::expect_within(s, call, out, expected, plan.wide_splits > 0 ? of_tiles : plan.teams ? fine : coarse);
    }
  }
};

}  // namespace kv4::tests
