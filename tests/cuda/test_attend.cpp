// Attention on a CUDA device against float64 attention over the dequantised cache, on the CPU's cases and within the
// CPU's bounds; at exact rows queries and weights are two 16-bit floats each, and weights of pages have 8 bits where
// warps read more than 4 rows, which the bounds add.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attend_cases.h"
#include "cuda/attend.h"
#include "device.h"

namespace kv4 {
namespace {

using scene::Call;
using scene::Held;
using scene::Scene;
using scene::Shape;
using tests::DeviceBytes;
using tests::DeviceScene;
using tests::Layout;

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
          for (std::int64_t c = 0; c < dv; ++c) out.push_back(there ? element(row + c * size, call.out_dtype) : 0.0);
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

constexpr DType kHalves[] = {DType::f16, DType::bf16};

TEST_F(CudaAttend, EveryHeadDimAndGroup) { scene::every_head_dim_and_group(kHalves, 1, check); }
TEST_F(CudaAttend, EveryTokenCount) { scene::every_token_count(check); }
TEST_F(CudaAttend, OnlyPagesAndAPartOfOne) { scene::pages_and_a_part_of_one(check); }
TEST_F(CudaAttend, ManyQueries) { scene::many_queries(kHalves, {2, 5, 9, 33, 64}, check); }
TEST_F(CudaAttend, RaggedBatchWithStartsAndWindows) { scene::ragged_batch({1, 7}, 2048, check); }
TEST_F(CudaAttend, GeneralMasksAndSoftcap) { scene::general_masks({false, true}, check); }
TEST_F(CudaAttend, LargeMeans) { scene::large_means(check); }

// Enough segments for one or two CTAs each on a device of 132 multiprocessors. Every reader has pages, the same number
// or some one more; exact items for some CTAs, for all and for none; and a sequence too short to divide the two apart.
TEST_F(CudaAttend, PagesApart) {
  struct Split {
    int dim, group, kv_heads;
    std::vector<Held> held;
  };
  std::uint64_t seed = 7000;
  for (const Split& c : {Split{128, 4, 40, {{4, 17 * 64 - 20, 12, 0}, {0, 640, 0, 0}}},
                         Split{128, 6, 33, {{4, 33 * 64, 40, 0}, {4, 36 * 64 - 1, 0, 0}}},
                         Split{64, 1, 70, {{0, 23 * 64, 20, 0}}}, Split{80, 12, 24, {{4, 30 * 64, 100, 0}}}}) {
    SCOPED_TRACE(::testing::Message() << "d " << c.dim << ", " << c.kv_heads << " KV heads");
    Shape shape;
    shape.dim_k = shape.dim_v = c.dim;
    shape.group = c.group;
    shape.kv_heads = c.kv_heads;
    shape.seed = seed++;
    const Scene s(shape, c.held);
    check(s, Call(s, 1));
    if (testing::Test::HasFatalFailure()) return;
  }
}

// More sequences than a warp has lanes, and no multiple of them.
TEST_F(CudaAttend, HundredsOfSequences) {
  for (const int batch : {33, 131}) {
    SCOPED_TRACE(batch);
    Shape shape;
    shape.dim_k = shape.dim_v = 64;
    shape.group = 3;
    shape.kv_heads = 2;
    shape.seed = 6000 + static_cast<std::uint64_t>(batch);
    std::vector<Held> held;
    for (int b = 0; b < batch; ++b)
      held.push_back(b % 7 == 3 ? Held{0, 0, 1, 0} : Held{b % 5, b % 3 * 64, 1 + b * 13 % 127, 0});
    const Scene s(shape, held);
    check(s, Call(s, 1));
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Each sequence with queries of its own, none among them; lengths from nothing on; pages in chunks, rows in blocks.
TEST_F(CudaAttend, SequencesWithQueriesOfTheirOwn) {
  const std::vector<Held> held = {{4, 640, 70, 0}, {0, 0, 0, 0},    {0, 0, 5, 0},    {4, 128, 127, 20},
                                  {0, 1000, 0, 0}, {2, 64, 130, 0}, {4, 2048, 64, 0}};
  struct Counts {
    int most;
    std::vector<int> queries;
  };
  std::uint64_t seed = 8000;
  for (const Counts& c :
       {Counts{5, {1, 0, 5, 5, 1, 0, 3}}, Counts{1, {1, 1, 0, 1, 1, 1, 0}}, Counts{40, {1, 2, 5, 40, 0, 1, 17}}})
    for (const int d : {64, 128, 256})
      for (const int group : {1, 4, 12}) {
        SCOPED_TRACE(::testing::Message() << c.most << " queries at most, d " << d << ", group " << group);
        Shape shape;
        shape.dim_k = shape.dim_v = d;
        shape.group = group;
        shape.kv_heads = d == 256 ? 1 : 2;
        shape.dtype = seed % 2 == 0 ? DType::f16 : DType::bf16;
        shape.seed = seed++;
        const Scene s(shape, held);
        Call call(s, c.most, shape.dtype);
        if (seed % 3 == 0) {
          call.starts({5, 0, 0, 25, 100, 0, 3});
          call.windows({200, 0, 3, 64, 4, 1000, 100});
        } else if (seed % 3 == 1) {
          call.general(seed % 2 == 0 ? Mask::General::boolean : Mask::General::additive, DType::f32, 700, true, true);
        }
        check_with(s, call, seed % 2 == 0 ? Layout{1, true} : Layout{3, false}, c.queries);
        if (testing::Test::HasFatalFailure()) return;
      }
}

// Chunks of prefills over sealed pages: more rows than a tile, than half of one, and fewer; pages that begin hidden or
// end early, that some rows see and others do not, and none.
TEST_F(CudaAttend, TilesOfManyRows) {
  const std::vector<Held> held = {
      {4, 17 * 64 - 20, 12, 0}, {0, 64, 40, 0}, {0, 0, 150, 0}, {2, 40 * 64, 130, 0}, {4, 9 * 64, 64, 20}};
  std::uint64_t seed = 8500;
  for (const int d : {64, 80, 96, 128})
    for (const auto& [group, queries] : {std::pair(4, 40), std::pair(1, 130), std::pair(7, 10), std::pair(3, 22)})
      for (const bool limits : {false, true}) {
        SCOPED_TRACE(::testing::Message() << queries << " queries, d " << d << ", group " << group << ", " << limits);
        Shape shape;
        shape.dim_k = shape.dim_v = d;
        shape.group = group;
        shape.kv_heads = 2;
        shape.dtype = seed % 2 == 0 ? DType::f16 : DType::bf16;
        shape.seed = seed++;
        const Scene s(shape, held);
        Call call(s, queries, shape.dtype);
        if (limits) {
          call.starts({500, 0, 3, 25, 100});
          call.windows({200, 30, 100, 1900, 64});
          if (seed % 4 < 2) call.args.softcap = 20;
        }
        check_with(s, call, seed % 3 == 0 ? Layout{3, true} : Layout{1, false}, {});
        if (testing::Test::HasFatalFailure()) return;
      }
}

TEST_F(CudaAttend, ChunksAndBlocks) {
  std::uint64_t seed = 9000;
  for (const int d : cases::kHeadDims)
    for (const bool bf16 : {false, true}) {
      SCOPED_TRACE(d);
      Shape shape;
      shape.dim_k = shape.dim_v = d;
      shape.group = bf16 ? 3 : 9;
      shape.dtype = bf16 ? DType::bf16 : DType::f16;
      shape.seed = seed++;
      const Scene s(shape, {{4, 320, 90, 0}, {0, 0, 300, 7}, {0, 640, 64, 0}, {64, 65, 128, 0}});
      check_with(s, Call(s, 2), {bf16 ? 2 : 0, true}, {});
      if (testing::Test::HasFatalFailure()) return;
    }
}

// The first page's first tokens, as a mask hides them; a window that all sequences share, as one for each.
TEST_F(CudaAttend, HiddenTokensAndOneWindowForAll) {
  std::uint64_t seed = 9100;
  for (const int d : {128, 256})
    for (const int group : {2, 6, 16}) {
      SCOPED_TRACE(::testing::Message() << "d " << d << ", group " << group);
      Shape shape;
      shape.dim_k = shape.dim_v = d;
      shape.group = group;
      shape.seed = seed++;
      const std::vector<Held> held = {{0, 640, 70, 0}, {0, 64, 0, 0}, {0, 40, 0, 0}, {0, 128, 9, 0}};
      const Scene s(shape, held);
      Call masked(s, 2), plain(s, 2);
      constexpr int kHidden[] = {4, 64, 17, 0};
      masked.general(Mask::General::boolean, DType::f32, 710, false, false);
      std::fill(masked.mask.begin(), masked.mask.end(), std::uint8_t{1});
      for (std::size_t b = 0; b < held.size(); ++b)
        std::fill_n(masked.mask.begin() + static_cast<std::ptrdiff_t>(b) * masked.args.mask.general_stride[0],
                    kHidden[b], std::uint8_t{0});
      masked.windows({600, 600, 600, 600});
      const DeviceScene scene(s);
      const Device of_masked(masked), of_plain(plain);
      for (const Way& way : {kTeams, kWarps, kThree}) {
        std::vector<std::uint8_t> out[2];
        for (const bool hidden : {false, true}) {
          const Device& device = hidden ? of_plain : of_masked;
          const DeviceBytes buffer(static_cast<std::size_t>(s.batch() * 2 * group * 2 * d * 4));
          std::vector<SequenceView> views = scene.views(2);
          for (std::size_t b = 0; hidden && b < views.size(); ++b) views[b].pages_hidden = kHidden[b];
          AttendJob job = job_of(s, scene, device.args, views);
          if (hidden) job.window = 600;
          job.out = {buffer.as(), DType::f32, {s.batch(), 2 * group, 2, d}, {4 * group * d, 2 * d, d, 1}};
          const Status status = launch(job, way);
          ASSERT_TRUE(status.ok()) << status.message();
          out[hidden ? 1 : 0] = buffer.read();
        }
        ASSERT_EQ(out[0], out[1]);
      }
    }
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
  const std::vector<double> whole = run(s, call, {kTeams, {}, {}}, &status);
  ASSERT_TRUE(status.ok());
  // Pages in one call, exact rows in another.
  std::vector<float> o[2], m[2], l[2];
  for (int part = 0; part < 2; ++part) {
    std::vector<SequenceView> some = views;
    for (SequenceView& v : some) {
      if (part == 0) v.exact[0].count = v.exact[1].count = 0;
      else v.page_count = 0;
    }
    const DeviceBytes od(static_cast<std::size_t>(rows * 128 * 4)), md(static_cast<std::size_t>(rows * 4)),
        ld(static_cast<std::size_t>(rows * 4));
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
      ASSERT_NEAR(o[0][static_cast<std::size_t>(r * 128 + c)] / l[0][static_cast<std::size_t>(r)],
                  whole[static_cast<std::size_t>(r * 128 + c)], 1e-4)
          << r << " " << c;
}

// A query with NaN or infinity gives NaN, in every kernel and whatever it sees, and leaves other rows alone.
TEST_F(CudaAttend, NonFiniteQueriesAreNaN) {
  constexpr std::int64_t kHead = 1;
  for (const auto& [way, queries] :
       {std::pair(kTeams, 1), std::pair(kWarps, 3), std::pair(kThree, 3), std::pair(kTiles, 40)}) {
    for (const bool mean : {true, false}) {
      for (const Held& held : {Held{4, 17 * 64, 70, 0}, Held{0, 17 * 64, 0, 0}, Held{4, 0, 70, 0}}) {
        if (way.tiles && held.page_tokens == 0) continue;
        SCOPED_TRACE(testing::Message() << way.name << ", mean " << mean << " pages " << held.page_tokens << " exact "
                                        << held.window);
        Shape shape;
        shape.group = 4;
        shape.kv_heads = 2;
        shape.mean = mean;
        shape.seed = 8900;
        const Scene s(shape, {held});
        const Call call(s, queries, DType::f16);
        const std::int64_t query = queries / 2;
        Status status;
        const std::vector<double> before = run(s, call, {way, {}, {}}, &status);
        ASSERT_TRUE(status.ok()) << status.message();
        for (const double bad : {static_cast<double>(NAN), scene::kInfinity, -scene::kInfinity}) {
          Call with(s, queries, DType::f16);
          with.set_query(0, kHead, query, 5, bad);
          const std::vector<double> after = run(s, with, {way, {}, {}}, &status);
          ASSERT_TRUE(status.ok()) << status.message();
          for (std::int64_t row = 0; row < 8 * queries; ++row)
            for (std::int64_t c = 0; c < shape.dim_v; ++c) {
              const auto i = static_cast<std::size_t>(row * shape.dim_v + c);
              if (row == kHead * queries + query) ASSERT_TRUE(std::isnan(after[i])) << bad << " " << c;
              else ASSERT_NEAR(after[i], before[i], 1e-3) << bad << " " << row << " " << c;
            }
        }
      }
    }
  }
}

TEST_F(CudaAttend, RefusalsSayWhy) {
  Shape shape;
  shape.dtype = DType::f32;
  const Scene s(shape, {Held{4, 64, 10, 0}});
  const Call call(s, 1);
  Status status;
  run(s, call, {kTeams, {}, {}}, &status);
  EXPECT_EQ(status.code(), StatusCode::unsupported);
  EXPECT_EQ(status.message(), "dtype: expected float16 or bfloat16 on CUDA; got float32");
  shape.dtype = DType::f16;
  shape.dim_k = shape.dim_v = 112;
  const Scene odd(shape, {Held{0, 64, 0, 0}});
  const Call odd_call(odd, 1);
  run(odd, odd_call, {kTeams, {}, {}}, &status);
  EXPECT_EQ(status.message(), "head_dim_k: expected 64, 80, 96, 128 or 256 on CUDA; got 112");
}

}  // namespace
}  // namespace kv4
