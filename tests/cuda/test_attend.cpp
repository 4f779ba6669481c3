// Attention on a CUDA device on the CPU's cases, within the CPU's bounds (attend_device.h), and on cases of its own.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attend_device.h"

namespace kv4 {
namespace {

using scene::Call;
using scene::Held;
using scene::Scene;
using scene::Shape;
using tests::CudaAttend;
using tests::DeviceBytes;
using tests::DeviceScene;
using tests::kHalves;
using tests::Layout;

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
