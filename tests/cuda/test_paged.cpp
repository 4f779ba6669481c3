// Sequences in a host's tables on a CUDA device: views and jobs that kernels make are those that the host makes of the
// same tables; what is called with them, also in a captured graph whose tables change, gives the bits of a call from
// the host.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/batch.h"
#include "device.h"
#include "paged_server.h"

namespace kv4 {
namespace {

using scene::Held;
using scene::Scene;
using scene::Shape;
using tests::DeviceBytes;
using tests::halves;

constexpr int kHeads = 2, kGroup = 4, kDim = 128, kPages = 40, kBlocks = 48, kSequences = 4, kWidth = 24, kSinks = 4;

// What stands in tables on the device, and the same on the host.
struct Tables {
  std::vector<std::int32_t> queries, lengths, sealed, pages, blocks, sinks, begin, end;
  DeviceBytes on_device[8];

  std::vector<std::int32_t>* all(int i) {
    std::vector<std::int32_t>* const tables[] = {&queries, &lengths, &sealed, &pages, &blocks, &sinks, &begin, &end};
    return tables[i];
  }
  void upload() {
    for (int i = 0; i < 8; ++i) {
      const std::size_t bytes = all(i)->size() * sizeof(std::int32_t);
      if (on_device[i].as() == nullptr) on_device[i] = DeviceBytes(bytes);
      ASSERT_EQ(cudaMemcpy(on_device[i].as(), all(i)->data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
    }
    ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);  // as DeviceBytes has it
  }
  const std::int32_t* at(int i, bool device) { return device ? on_device[i].as<std::int32_t>() : all(i)->data(); }
  // A pointer into a table of the host's as one into the device's.
  const std::int32_t* moved(const std::int32_t* p, int i) {
    return p == nullptr ? nullptr : on_device[i].as<std::int32_t>() + (p - all(i)->data());
  }
};

class CudaPaged : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
    Shape shape;
    shape.kv_heads = kHeads;
    shape.group = kGroup;
    shape.dim_k = shape.dim_v = kDim;
    scene_ = std::make_unique<Scene>(shape, std::vector<Held>{{0, kPages * kPageTokens, 0, 0}}, false);
    device_ = std::make_unique<tests::DeviceScene>(*scene_, tests::Layout{2, false});
    cases::Random random(17);
    std::vector<std::uint16_t> rows = halves(random, static_cast<std::size_t>(kBlocks) * kHeads * kPageTokens * kDim);
    k_ = DeviceBytes(rows);
    std::reverse(rows.begin(), rows.end());
    v_ = DeviceBytes(rows);
    lambda_ = DeviceBytes(std::vector<float>(kSequences * kHeads * kDim, 1.25f));
    batch_.size = kSequences;
    batch_.page_memory = device_->pages();
    batch_.row_memory.k = k_.as();
    batch_.row_memory.v = v_.as();
    batch_.row_memory.k_stride = batch_.row_memory.v_stride = kDim;
    batch_.row_memory.k_head_stride = batch_.row_memory.v_head_stride = kDim * kPageTokens;
    batch_.row_memory.k_block_stride = batch_.row_memory.v_block_stride = kDim * kPageTokens * kHeads;
    batch_.lambda_k = lambda_.as<float>();
    batch_.lambda_k_stride = kHeads * kDim;
    batch_.sink_tokens = kSinks;
    batch_.pages_stride = batch_.blocks_stride = kWidth;
    tables_.pages.assign(kSequences * kWidth, -7);
    tables_.blocks.assign(kSequences * kWidth, -7);
  }
  void TearDown() override { cuda::set_stream(nullptr); }

  // Tokens of each sequence, the call's included, those in pages, and the call's. Ids are drawn anew.
  void fill(const std::vector<std::int32_t>& lengths, const std::vector<std::int32_t>& sealed,
            const std::vector<std::int32_t>& counts, std::uint64_t seed) {
    cases::Random random(seed);
    std::vector<std::int32_t> pages(kPages), blocks(kBlocks);
    for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<std::int32_t>(i);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<std::int32_t>(i);
    const auto shuffle = [&random](std::vector<std::int32_t>& x) {
      for (std::size_t i = x.size(); i-- > 1;) std::swap(x[i], x[random.bits() % (i + 1)]);
    };
    shuffle(pages);
    shuffle(blocks);
    tables_.lengths = lengths;
    tables_.sealed = sealed;
    tables_.queries.assign(1, 0);
    tables_.sinks.clear();
    tables_.begin.clear();
    tables_.end.clear();
    for (std::size_t b = 0; b < kSequences; ++b) {
      tables_.queries.push_back(tables_.queries.back() + counts[b]);
      for (std::int32_t i = 0; i < sealed[b] / kPageTokens; ++i) {
        tables_.pages[b * kWidth + static_cast<std::size_t>(i)] = pages.back();
        pages.pop_back();
      }
      for (std::int32_t i = 0; i < (lengths[b] + kPageTokens - 1) / kPageTokens; ++i) {
        if (i < sealed[b] / kPageTokens && i >= 2) continue;  // some blocks of sealed tokens stay, to be sealed again
        tables_.blocks[b * kWidth + static_cast<std::size_t>(i)] = blocks.back();
        blocks.pop_back();
      }
      tables_.sinks.push_back(blocks.back());
      blocks.pop_back();
      tables_.begin.push_back(0);
      tables_.end.push_back(std::min(sealed[b], 2 * kPageTokens));
    }
    ASSERT_GT(pages.size() + blocks.size(), 0u);
    tables_.upload();
  }
  // Whole blocks that no query reads as pages are to be sealed, into pages that nobody has, at most three of a
  // sequence.
  void range_behind_sealed() {
    std::vector<bool> taken(kPages, false);
    for (std::size_t b = 0; b < kSequences; ++b)
      for (std::int32_t i = 0; i < tables_.sealed[b] / kPageTokens; ++i)
        taken[static_cast<std::size_t>(tables_.pages[b * kWidth + static_cast<std::size_t>(i)])] = true;
    for (std::size_t b = 0; b < kSequences; ++b) {
      const std::int32_t first = tables_.sealed[b] / kPageTokens, last = tables_.lengths[b] / kPageTokens;
      ASSERT_LE(last - first, 3);
      for (std::int32_t i = first; i < last; ++i) {
        const auto free = std::find(taken.begin(), taken.end(), false);
        ASSERT_NE(free, taken.end());
        tables_.pages[b * kWidth + static_cast<std::size_t>(i)] = static_cast<std::int32_t>(free - taken.begin());
        *free = true;
      }
      tables_.begin[b] = first * kPageTokens;
      tables_.end[b] = last * kPageTokens;
    }
    tables_.upload();
  }
  PagedBatch batch(bool device) {
    PagedBatch out = batch_;
    out.queries = tables_.at(0, device);
    out.lengths = tables_.at(1, device);
    out.sealed = tables_.at(2, device);
    out.pages = tables_.at(3, device);
    out.blocks = tables_.at(4, device);
    out.sinks = tables_.at(5, device);
    return out;
  }
  PageRange range(bool device) { return {tables_.at(6, device), tables_.at(7, device), 3}; }

  // By the host, with the device's pointers.
  std::vector<SequenceView> host_views(bool stored) {
    std::vector<SequenceView> views;
    for (int b = 0; b < kSequences; ++b) {
      SequenceView v = view_of(batch(false), b, stored);
      v.pages = tables_.moved(v.pages, 3);
      v.exact[0].blocks = tables_.moved(v.exact[0].blocks, 5);
      v.exact[1].blocks = tables_.moved(v.exact[1].blocks, 4);
      views.push_back(v);
    }
    return views;
  }
  template <class Job>
  std::vector<Job> jobs_of() {
    std::vector<Job> jobs(static_cast<std::size_t>(kSequences * range(false).most));
    EXPECT_TRUE(cuda::backend()->Backend::make_jobs(batch(false), DType::f16, range(false), jobs.data()).ok());
    return jobs;
  }
  // What the range holds: so many jobs lead the list.
  std::size_t pages_in_range() {
    std::int32_t pages = 0;
    for (std::size_t b = 0; b < kSequences; ++b) pages += (tables_.end[b] - tables_.begin[b]) / kPageTokens;
    return static_cast<std::size_t>(pages);
  }
  AttendJob attend_job(const TensorView& q, const DeviceBytes& out) const {
    AttendJob job;
    job.args.q = q;
    job.spec = &device_->spec();
    job.pages = batch_.page_memory;
    job.dtype = DType::f16;
    job.kv_heads = kHeads;
    job.head_dim_k = job.head_dim_v = kDim;
    job.window = batch_.window;
    job.out = {out.as(), DType::f32, q.shape, q.stride};
    return job;
  }
  std::size_t memory_bytes() const {
    return static_cast<std::size_t>(batch_.page_memory.page_stride) << batch_.page_memory.chunk_shift;
  }
  // All pages.
  std::vector<std::uint8_t> pages_now() const {
    std::vector<std::uint8_t> all;
    constexpr int kChunks = kPages / 4;
    std::vector<std::uint8_t*> chunks(kChunks);
    EXPECT_EQ(cudaMemcpy(chunks.data(), batch_.page_memory.chunks, sizeof chunks[0] * kChunks, cudaMemcpyDeviceToHost),
              cudaSuccess);
    for (const std::uint8_t* chunk : chunks) {
      all.resize(all.size() + memory_bytes());
      EXPECT_EQ(cudaMemcpy(all.data() + all.size() - memory_bytes(), chunk, memory_bytes(), cudaMemcpyDeviceToHost),
                cudaSuccess);
    }
    return all;
  }
  void clear_pages() const {
    std::vector<std::uint8_t*> chunks(kPages / 4);
    EXPECT_EQ(
        cudaMemcpy(chunks.data(), batch_.page_memory.chunks, sizeof chunks[0] * chunks.size(), cudaMemcpyDeviceToHost),
        cudaSuccess);
    for (std::uint8_t* chunk : chunks) EXPECT_EQ(cudaMemset(chunk, 0, memory_bytes()), cudaSuccess);
  }

  std::unique_ptr<Scene> scene_;
  std::unique_ptr<tests::DeviceScene> device_;
  DeviceBytes k_, v_, lambda_;
  PagedBatch batch_;
  Tables tables_;
};

TEST_F(CudaPaged, ViewsAndJobsAreTheHosts) {
  Backend& backend = *cuda::backend();
  for (const std::int32_t window : {0, 200}) {
    batch_.window = window;
    fill({700, 0, 130, 64}, {576, 0, 64, 64}, {1, 0, 5, 2}, 3);
    for (const bool stored : {false, true}) {
      const DeviceBytes views(kSequences * sizeof(SequenceView));
      ASSERT_TRUE(backend.make_views(batch(true), stored, views.as<SequenceView>()).ok());
      const std::vector<SequenceView> expected = host_views(stored);
      const std::vector<std::uint8_t> got = views.read();
      for (std::size_t b = 0; b < kSequences; ++b)
        EXPECT_EQ(std::memcmp(got.data() + b * sizeof(SequenceView), &expected[b], sizeof(SequenceView)), 0)
            << window << " " << stored << " " << b;
    }
    const std::vector<SealJob> expected = jobs_of<SealJob>();
    const std::size_t used = pages_in_range();
    ASSERT_GT(used, 2u);
    ASSERT_LT(used, expected.size());
    const DeviceBytes jobs(expected.size() * sizeof(SealJob)), rows(expected.size() * sizeof(DequantiseJob));
    ASSERT_TRUE(backend.make_jobs(batch(true), DType::f16, range(true), jobs.as<SealJob>()).ok());
    std::vector<SealJob> got(expected.size());
    std::memcpy(got.data(), jobs.read().data(), jobs.read().size());
    EXPECT_EQ(std::memcmp(got.data(), expected.data(), used * sizeof(SealJob)), 0);
    EXPECT_EQ(expected[0].hidden, kSinks);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(expected[i].page >= 0, i < used);
      EXPECT_EQ(got[i].page, expected[i].page);
    }
    ASSERT_TRUE(backend.make_jobs(batch(true), DType::f16, range(true), rows.as<DequantiseJob>()).ok());
    std::vector<DequantiseJob> of_rows(expected.size());
    std::memcpy(of_rows.data(), rows.read().data(), rows.read().size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(of_rows[i].page, expected[i].page);
      if (expected[i].page < 0) continue;
      EXPECT_EQ(of_rows[i].k, expected[i].k);
      EXPECT_EQ(of_rows[i].v, expected[i].v);
      EXPECT_EQ(of_rows[i].lambda_k, expected[i].lambda_k);
      EXPECT_EQ(of_rows[i].k_head_stride, expected[i].k_head_stride);
      EXPECT_EQ(of_rows[i].count, kPageTokens);
      EXPECT_EQ(of_rows[i].dtype, DType::f16);
    }
  }
}

TEST_F(CudaPaged, JobsOnTheDeviceSealAndDequantiseAsTheHosts) {
  Backend& backend = *cuda::backend();
  fill({700, 10, 200, 64}, {576, 0, 128, 64}, {1, 1, 1, 1}, 5);
  const std::vector<SealJob> jobs = jobs_of<SealJob>();
  std::vector<std::uint8_t> sealed[3];
  for (const int how : {0, 1, 2}) {
    clear_pages();
    if (how == 0) {
      ASSERT_TRUE(backend.seal(device_->spec(), batch_.page_memory, kHeads, jobs, false).ok());
    } else if (how == 1) {
      const DeviceBytes on_device(jobs.size() * sizeof(SealJob));
      ASSERT_TRUE(backend.make_jobs(batch(true), DType::f16, range(true), on_device.as<SealJob>()).ok());
      ASSERT_TRUE(
          backend.seal(device_->spec(), batch_.page_memory, kHeads, {on_device.as<SealJob>(), jobs.size()}, true).ok());
    } else {  // head by head, hidden rows as masked ones
      std::vector<std::uint8_t> flags(kPageTokens, 0);
      std::fill_n(flags.begin(), kSinks, std::uint8_t{1});
      const DeviceBytes skip(flags);
      for (SealJob job : jobs)
        for (int h = 0; h < kHeads; ++h) {
          SealJob one = job;
          one.k = static_cast<const std::uint16_t*>(job.k) + h * job.k_head_stride;
          one.v = static_cast<const std::uint16_t*>(job.v) + h * job.v_head_stride;
          one.lambda_k = job.lambda_k + h * kDim;
          if (job.hidden > 0) one.skip = skip.as<std::uint8_t>();
          one.hidden = 0;
          PageMemory slices =
              batch_.page_memory;  // a head's slices as pages of one head: pages are in chunks, slices in each
          std::vector<std::uint8_t*> chunks(kPages / 4);
          ASSERT_EQ(cudaMemcpy(chunks.data(), slices.chunks, sizeof chunks[0] * chunks.size(), cudaMemcpyDeviceToHost),
                    cudaSuccess);
          for (std::uint8_t*& chunk : chunks) chunk += h * slices.head_stride;
          const DeviceBytes table(chunks);
          slices.chunks = table.as<std::uint8_t* const>();
          ASSERT_TRUE(backend.seal(device_->spec(), slices, 1, {&one, 1}, false).ok());
          ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        }
    }
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    sealed[how] = pages_now();
  }
  EXPECT_EQ(sealed[0], sealed[1]);
  EXPECT_EQ(sealed[0], sealed[2]);
  EXPECT_TRUE(std::any_of(sealed[0].begin(), sealed[0].end(), [](std::uint8_t x) { return x != 0; }));

  // And back, over the blocks: of jobs on the device and on the host.
  std::vector<std::uint8_t> rows[2];
  const std::vector<std::uint8_t> before = k_.read();
  for (const bool resident : {false, true}) {
    std::vector<DequantiseJob> back = jobs_of<DequantiseJob>();
    if (resident) {
      const DeviceBytes on_device(back.size() * sizeof(DequantiseJob));
      ASSERT_TRUE(backend.make_jobs(batch(true), DType::f16, range(true), on_device.as<DequantiseJob>()).ok());
      ASSERT_TRUE(backend
                      .dequantise(device_->spec(), batch_.page_memory, kHeads,
                                  {on_device.as<DequantiseJob>(), back.size()}, true)
                      .ok());
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    } else {
      ASSERT_TRUE(backend.dequantise(device_->spec(), batch_.page_memory, kHeads, back, false).ok());
    }
    rows[resident ? 1 : 0] = k_.read();
    ASSERT_EQ(cudaMemcpy(k_.as(), before.data(), before.size(), cudaMemcpyHostToDevice), cudaSuccess);
  }
  EXPECT_EQ(rows[0], rows[1]);
  EXPECT_NE(rows[0], before);
}

// Views, store and attention in one graph, replayed after tables and lengths have changed, against calls with views of
// the host's.
TEST_F(CudaPaged, ACapturedCallReadsTheTablesWhenItRuns) {
  Backend& backend = *cuda::backend();
  constexpr std::int64_t kRows = 16, kLongest = 1200, kAll = 2400;
  cases::Random random(23);
  const DeviceBytes fresh_k(halves(random, kHeads * kRows * kDim)), fresh_v(halves(random, kHeads * kRows * kDim)),
      queries(halves(random, kHeads * kGroup * kRows * kDim));
  const TensorView k{fresh_k.as(), DType::f16, {1, kHeads, kRows, kDim}, {0, kRows * kDim, kDim, 1}};
  const TensorView v{fresh_v.as(), DType::f16, {1, kHeads, kRows, kDim}, {0, kRows * kDim, kDim, 1}};
  // Queries by row, then head.
  const TensorView q{queries.as(), DType::f16, {1, kHeads * kGroup, kRows, kDim}, {0, kDim, kHeads * kGroup * kDim, 1}};
  const std::size_t out_bytes = kHeads * kGroup * kRows * kDim * sizeof(float);
  const DeviceBytes out(out_bytes), other(out_bytes), before(kSequences * sizeof(SequenceView)),
      after(kSequences * sizeof(SequenceView));
  for (const std::int64_t most : {1, 9}) {
    fill({130, 1, 70, 64}, {64, 0, 0, 0}, {1, 1, 1, 1}, 1);
    const Sequences limits{{after.as<SequenceView>(), kSequences}, true, most, kLongest, kAll};
    AttendJob job = attend_job(q, out);
    job.sequences = limits;
    const DeviceBytes workspace(backend.attend_workspace(job), 0);
    ASSERT_GT(backend.attend_workspace(job), 0u);
    job.workspace = {workspace.as<std::byte>(), backend.attend_workspace(job)};
    StoreJob store;
    store.k = k;
    store.v = v;
    store.in_order = true;
    store.sequences = {{before.as<SequenceView>(), kSequences}, true, most};
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    cuda::set_stream(stream);
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    const Status calls[] = {backend.make_views(batch(true), false, before.as<SequenceView>()), backend.store(store),
                            backend.make_views(batch(true), true, after.as<SequenceView>()), backend.attend(job)};
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    for (const Status& s : calls) ASSERT_TRUE(s.ok()) << s.message();
    ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
    struct Replay {
      std::vector<std::int32_t> lengths, sealed, counts;
    };
    const Replay ones[] = {{{130, 1, 70, 64}, {64, 0, 0, 0}, {1, 1, 1, 1}},
                           {{1200, 65, 0, 200}, {1024, 64, 0, 128}, {1, 1, 0, 1}},
                           {{9, 0, 0, 700}, {0, 0, 0, 640}, {1, 0, 0, 0}}};
    const Replay more[] = {{{130, 9, 70, 64}, {64, 0, 0, 0}, {1, 9, 5, 1}},
                           {{1200, 65, 0, 200}, {1024, 0, 0, 128}, {1, 5, 0, 9}},
                           {{0, 7, 0, 700}, {0, 0, 0, 640}, {0, 7, 0, 9}}};
    std::uint64_t seed = 31;
    for (const Replay& state : most == 1 ? ones : more) {
      SCOPED_TRACE(::testing::Message() << most << " " << seed);
      fill(state.lengths, state.sealed, state.counts, seed++);
      if (HasFatalFailure()) return;
      ASSERT_EQ(cudaMemset(out.as(), 0xff, out_bytes), cudaSuccess);
      ASSERT_EQ(cudaMemset(other.as(), 0xff, out_bytes), cudaSuccess);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      ASSERT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      const std::vector<std::uint8_t> stored_k = k_.read(), stored_v = v_.read();
      // Rows lie where the tables say.
      for (std::size_t b = 0; b < kSequences; ++b)
        for (std::int32_t t = 0; t < state.counts[b]; ++t)
          for (std::int64_t h = 0; h < kHeads; ++h) {
            const std::int32_t position = state.lengths[b] - state.counts[b] + t, row = tables_.queries[b] + t;
            const std::int64_t block = tables_.blocks[b * kWidth + static_cast<std::size_t>(position / kPageTokens)];
            const std::size_t at =
                static_cast<std::size_t>((block * kHeads + h) * kPageTokens + position % kPageTokens) * kDim * 2;
            const std::size_t from = static_cast<std::size_t>(h * kRows + row) * kDim * 2;
            ASSERT_EQ(std::memcmp(stored_k.data() + at, fresh_k.read().data() + from, kDim * 2), 0) << b << " " << t;
            ASSERT_EQ(std::memcmp(stored_v.data() + at, fresh_v.read().data() + from, kDim * 2), 0) << b << " " << t;
          }
      const std::vector<SequenceView> views = host_views(true);
      AttendJob eager = attend_job(q, other);
      eager.sequences = {views, false, most, kLongest, kAll};
      const Status status = backend.attend(eager);
      ASSERT_TRUE(status.ok()) << status.message();
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      const std::vector<std::uint8_t> got = out.read(), want = other.read();
      ASSERT_EQ(got, want);
      std::size_t written = 0;
      for (std::size_t i = 0; i < got.size(); i += 4)
        written += std::memcmp(got.data() + i, "\xff\xff\xff\xff", 4) != 0;
      EXPECT_EQ(written, static_cast<std::size_t>(tables_.queries.back()) * kHeads * kGroup * kDim);
    }
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
    cuda::set_stream(nullptr);
    cudaStreamDestroy(stream);
  }
}

// A server's calls one by one and in one, against plain views.
TEST_F(CudaPaged, AServerReadsWhatPlainViewsRead) {
  tests::run_server({.backend = "cuda"}, 41, 40);
  tests::run_server({.backend = "cuda", .kv_heads = 1, .group = 8, .dim = 128, .dtype = DType::bf16, .sinks = 0}, 42,
                    40);
  tests::run_server({.backend = "cuda", .kv_heads = 3, .group = 1, .dim = 256, .sinks = 64, .window = 100}, 43, 30);
}

// A whole step in a graph: what it stores, answers and seals is that of calls one by one, also where a replay has
// nothing to seal.
TEST_F(CudaPaged, AStepInAGraphIsItsCallsOneByOne) {
  Backend& backend = *cuda::backend();
  constexpr std::int64_t kRows = kSequences, kLongest = 1200, kAll = 2400;
  cases::Random random(29);
  const DeviceBytes fresh_k(halves(random, kHeads * kRows * kDim)), fresh_v(halves(random, kHeads * kRows * kDim)),
      queries(halves(random, kHeads * kGroup * kRows * kDim));
  const auto rows = [](const DeviceBytes& x, int heads) {
    return TensorView{x.as(), DType::f16, {1, heads, kRows, kDim}, {0, kDim, heads * kDim, 1}};
  };
  const TensorView q = rows(queries, kHeads * kGroup);
  const std::size_t out_bytes = kHeads * kGroup * kRows * kDim * sizeof(float);
  const DeviceBytes out(out_bytes), other(out_bytes), views(kSequences * sizeof(SequenceView)),
      jobs(kSequences * 3 * sizeof(SealJob));
  fill({130, 1, 70, 64}, {64, 0, 0, 0}, {1, 1, 1, 1}, 1);
  AttendJob job = attend_job(q, out);
  job.sequences = {{views.as<SequenceView>(), kSequences}, true, 1, kLongest, kAll};
  const DeviceBytes workspace(backend.attend_workspace(job), 0);
  job.workspace = {workspace.as<std::byte>(), backend.attend_workspace(job)};
  Backend::Step step;
  step.k = rows(fresh_k, kHeads);
  step.v = rows(fresh_v, kHeads);
  step.dtype = DType::f16;
  step.range = range(true);
  step.views = views.as<SequenceView>();
  step.jobs = jobs.as<SealJob>();
  PagedBatch limited = batch(true);
  limited.most_queries = 1;
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  cuda::set_stream(stream);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  const Status calls[] = {
      backend.begin_step(limited, step), backend.attend(job),
      backend.end_step(device_->spec(), batch_.page_memory, kHeads, {step.jobs, kSequences * std::size_t{3}})};
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  for (const Status& s : calls) ASSERT_TRUE(s.ok()) << s.message();
  ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
  struct Replayed {
    std::vector<std::int32_t> lengths, sealed, counts;
    bool seals;
  };
  const Replayed all[] = {{{130, 1, 70, 64}, {64, 0, 0, 0}, {1, 1, 1, 1}, true},
                          {{1199, 63, 0, 200}, {1152, 0, 0, 192}, {1, 1, 0, 1}, false},
                          {{1152, 128, 9, 192}, {1024, 64, 0, 0}, {1, 1, 0, 1}, true}};
  std::uint64_t seed = 31;
  for (const Replayed& now : all) {
    SCOPED_TRACE(seed);
    fill(now.lengths, now.sealed, now.counts, seed++);
    range_behind_sealed();
    const std::vector<std::uint8_t> before = pages_now();
    ASSERT_EQ(cudaMemset(out.as(), 0xff, out_bytes), cudaSuccess);
    ASSERT_EQ(cudaMemset(other.as(), 0xff, out_bytes), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    const std::vector<std::uint8_t> sealed = pages_now(), stored_k = k_.read(), stored_v = v_.read();
    EXPECT_EQ(sealed != before, now.seals);
    const std::vector<SequenceView> after = host_views(true);
    EXPECT_EQ(std::memcmp(views.read().data(), after.data(), after.size() * sizeof after[0]), 0);
    StoreJob store;
    store.k = step.k;
    store.v = step.v;
    const std::vector<SequenceView> unstored = host_views(false);
    store.sequences = {unstored, false, 1};
    ASSERT_TRUE(backend.store(store).ok());
    EXPECT_TRUE(k_.read() == stored_k && v_.read() == stored_v);
    AttendJob eager = attend_job(q, other);
    eager.sequences = {after, false, 1, kLongest, kAll};
    ASSERT_TRUE(backend.attend(eager).ok());
    ASSERT_TRUE(backend.seal(device_->spec(), batch_.page_memory, kHeads, jobs_of<SealJob>(), false).ok());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(out.read(), other.read());
    EXPECT_EQ(pages_now(), sealed);
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cuda::set_stream(nullptr);
  cudaStreamDestroy(stream);
}

TEST_F(CudaPaged, StoreWithoutALimitOfRowsIsRefused) {
  CacheConfig config;
  config.dtype = DType::f16;
  config.kv_heads = kHeads;
  config.head_dim_k = config.head_dim_v = kDim;
  config.backend = "cuda:0";
  std::unique_ptr<PageFormat> format;
  ASSERT_TRUE(PageFormat::create(config, &format).ok());
  const TensorView rows = {k_.as(), DType::f16, {1, kHeads, 1, kDim}, {kHeads * kDim, kDim, kDim, 1}};
  const DeviceBytes workspace(std::size_t{1} << 20, 0);
  PagedBatch unbounded = batch_;
  unbounded.queries = unbounded.lengths = unbounded.sealed = unbounded.pages = unbounded.blocks = unbounded.sinks =
      workspace.as<std::int32_t>();
  unbounded.most_queries = 0;
  const Status status = format->store(unbounded, rows, rows, {workspace.as<std::byte>(), std::size_t{1} << 20});
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_NE(status.message().find("batch.most_queries"), std::string::npos) << status.message();
}

// Rows that are sealed as they arrive: what is not finite is reported and masked, nothing is stored.
TEST_F(CudaPaged, RowsThatAreNotFiniteAreFoundWithoutBeingStored) {
  Backend& backend = *cuda::backend();
  constexpr std::int64_t kRows = 7;
  std::vector<std::uint16_t> rows(2 * kHeads * kRows * kDim, f32_to_f16(1.0f));
  const auto at = [](std::int64_t b, std::int64_t h, std::int64_t t) {
    return static_cast<std::size_t>(((b * kHeads + h) * kRows + t) * kDim);
  };
  std::vector<std::uint16_t> keys = rows, values = rows;
  keys[at(0, 1, 3) + 5] = 0x7c00;      // infinity
  values[at(1, 0, 6) + 127] = 0x7e00;  // NaN
  const DeviceBytes k(keys), v(values), skip(2 * kRows, 0);
  LateNote* notes[2] = {};
  std::vector<SequenceView> views(2);
  for (int b = 0; b < 2; ++b) {
    ASSERT_TRUE(backend.alloc_note(&notes[b]).ok());
    views[static_cast<std::size_t>(b)].input = b;
    views[static_cast<std::size_t>(b)].input_row = b;
    views[static_cast<std::size_t>(b)].query_count = kRows - b;
    views[static_cast<std::size_t>(b)].exact[1].position = 100 * (b + 1);
    views[static_cast<std::size_t>(b)].note = notes[b];
  }
  StoreJob job;
  job.k = {k.as(), DType::f16, {2, kHeads, kRows, kDim}, {kHeads * kRows * kDim, kRows * kDim, kDim, 1}};
  job.v = job.k;
  job.v.data = v.as();
  job.sequences.views = views;
  job.skip = skip.as<std::uint8_t>();
  ASSERT_TRUE(backend.store(job).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::vector<std::uint8_t> expected(2 * kRows, 0);
  expected[3] = expected[kRows + 6] = 1;
  EXPECT_EQ(skip.read(), expected);
  EXPECT_EQ(notes[0]->key, 100 + 3 + 1);
  EXPECT_EQ(notes[0]->value, 0);
  EXPECT_EQ(notes[1]->key, 0);
  EXPECT_EQ(notes[1]->value, 200 + 5 + 1);
  for (LateNote* note : notes) backend.free_note(note);
}

}  // namespace
}  // namespace kv4
