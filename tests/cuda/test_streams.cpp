// Caches that run concurrently on one device: threads, streams and captured graphs at once give the same bits as one
// after another, their memory is freed, and what the device refuses is reported.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include "cuda/backend.h"
#include "cuda/rows.h"
#include "device.h"
#include "format/convert.h"
#include "kv4/cache.h"

namespace kv4 {
namespace {

using tests::DeviceBytes;

constexpr int kHeads = 2, kQueryHeads = 8, kDim = 128;
// Segments of a call, a KV head of a sequence each, are more than any device has multiprocessors (three kernels), or
// few (one).
constexpr int kMany = 400, kSome = 100, kFew = 20;

class CudaStreams : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::backend() == nullptr) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or later";
  }
  void TearDown() override { cuda::set_stream(nullptr); }
};

class Stream {
 public:
  Stream() { EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess); }
  ~Stream() { EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void wait() const { EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess); }

 private:
  cudaStream_t stream_ = nullptr;
};

CacheConfig config_of(std::uint64_t seed) {
  CacheConfig config;
  config.backend = "cuda";
  config.dtype = DType::f16;
  config.kv_heads = kHeads;
  config.head_dim_k = config.head_dim_v = kDim;
  config.recipe.key.lambda = LambdaMode::given;
  config.lambda_k = cases::normal_rows(kHeads, kDim, seed, 0.2);
  for (float& x : config.lambda_k) x = 1 + std::abs(x);
  return config;
}

// A cache of `tokens` tokens of each sequence, and a call of one query token over it. Its tensors are its own.
class Decoder {
 public:
  Decoder(int batch, int tokens, std::uint64_t seed) : batch_(batch), tokens_(tokens) {
    const std::vector<float> base = cases::key_rows(1021, kDim, seed);
    std::vector<std::uint16_t> rows(static_cast<std::size_t>(batch) * kHeads * static_cast<std::size_t>(tokens) * kDim);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = f32_to_f16(base[i % base.size()]);
    rows_ = DeviceBytes(rows);
    q_ = DeviceBytes(cases::normal_rows(batch * kQueryHeads, kDim, seed + 1));
    out_ = DeviceBytes(out_bytes());
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // what follows is on streams that know nothing of these copies
    const Status status = Cache::create(config_of(seed), &cache_);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  // The prompt, then one token, on the thread that calls.
  void fill(cudaStream_t stream) {
    cache_->set_stream(stream);
    for (const int count : {tokens_ - 1, 1}) {
      const Status appended = cache_->append(rows(count), rows(count));
      ASSERT_TRUE(appended.ok()) << appended.message();
      ASSERT_TRUE(attend());
    }
    ASSERT_TRUE(attend());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    ASSERT_GT(cache_->page_count(0), 0);
    want_ = out_.read();
  }
  bool attend() {
    AttendArgs args;
    args.q = {q_.as(), DType::f32, {batch_, kQueryHeads, 1, kDim}, {kQueryHeads * kDim, kDim, kDim, 1}};
    const Status status = cache_->attend(args, {out_.as(), DType::f32, args.q.shape, args.q.stride});
    EXPECT_TRUE(status.ok()) << status.message();
    return status.ok();
  }
  bool step() {
    const Status appended = cache_->append(rows(1), rows(1));
    EXPECT_TRUE(appended.ok()) << appended.message();
    return appended.ok() && attend();
  }
  // What each of many steps leaves as output, one behind the other; nothing where one fails.
  std::vector<std::uint8_t> outputs_of(int times, cudaStream_t stream, const std::function<bool()>& step) {
    const DeviceBytes all(out_bytes() * static_cast<std::size_t>(times));
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    for (int i = 0; i < times; ++i) {
      auto* const to = all.as<std::byte>() + out_bytes() * static_cast<std::size_t>(i);
      if (!step() || cudaMemcpyAsync(to, out_.as(), out_bytes(), cudaMemcpyDeviceToDevice, stream) != cudaSuccess)
        return {};
    }
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    return all.read();
  }
  // Of many times the same call, those whose output is not what the calls one by one gave.
  int wrong_of(int times, cudaStream_t stream, const std::function<bool()>& call) {
    const std::vector<std::uint8_t> got = outputs_of(times, stream, call);
    if (got.empty()) return times;
    int wrong = 0;
    for (int i = 0; i < times; ++i)
      wrong += std::memcmp(got.data() + out_bytes() * static_cast<std::size_t>(i), want_.data(), out_bytes()) != 0;
    return wrong;
  }
  TensorView rows(std::int64_t count) const {
    return {rows_.as(), DType::f16, {batch_, kHeads, count, kDim}, {kHeads * tokens_ * kDim, tokens_ * kDim, kDim, 1}};
  }
  Cache& cache() { return *cache_; }

 private:
  std::size_t out_bytes() const { return static_cast<std::size_t>(batch_) * kQueryHeads * kDim * sizeof(float); }
  int batch_, tokens_;
  DeviceBytes rows_, q_, out_;
  std::unique_ptr<Cache> cache_;
  std::vector<std::uint8_t> want_;
};

// The decoder's call, or a whole step, as a graph.
class Replay {
 public:
  Replay(Decoder& decoder, cudaStream_t stream, bool step = false) : stream_(stream) {
    EXPECT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    EXPECT_TRUE(step ? decoder.step() : decoder.attend());
    EXPECT_EQ(cudaStreamEndCapture(stream, &graph_), cudaSuccess);
  }
  ~Replay() {
    if (exec_ != nullptr) {
      EXPECT_EQ(cudaGraphExecDestroy(exec_), cudaSuccess);
    }
    EXPECT_EQ(cudaGraphDestroy(graph_), cudaSuccess);
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  bool instantiate() {
    const cudaError_t e = cudaGraphInstantiate(&exec_, graph_, 0);
    EXPECT_EQ(e, cudaSuccess) << cudaGetErrorString(e);
    return e == cudaSuccess;
  }
  bool operator()() const {
    const cudaError_t e = cudaGraphLaunch(exec_, stream_);
    EXPECT_EQ(e, cudaSuccess) << cudaGetErrorString(e);
    return e == cudaSuccess;
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// Both at once, as near as threads can be brought to it.
void at_once(const std::function<void()>& a, const std::function<void()>& b) {
  std::atomic<int> there = 0;
  const auto meet = [&there] {
    ++there;
    while (there < 2) std::this_thread::yield();
  };
  std::thread other([&] {
    meet();
    b();
  });
  meet();
  a();
  other.join();
}

TEST_F(CudaStreams, ThreadsOnTheirOwnStreamsWithOtherBatchesGetTheirOwnBits) {
  constexpr int kTimes = 300;
  const Stream s, t;
  Decoder some(kSome, 200, 1), many(kMany, 200, 2);
  some.fill(s);
  many.fill(t);
  int wrong[2] = {};
  at_once([&] { wrong[0] = some.wrong_of(kTimes, s, [&] { return some.attend(); }); },
          [&] { wrong[1] = many.wrong_of(kTimes, t, [&] { return many.attend(); }); });
  EXPECT_EQ(wrong[0], 0);
  EXPECT_EQ(wrong[1], 0);
}

TEST_F(CudaStreams, ThreadsOnOneStreamGetTheirOwnBits) {
  constexpr int kTimes = 300;
  for (const bool null_stream : {false, true}) {
    SCOPED_TRACE(null_stream ? "the default stream" : "a stream");
    const Stream own;
    const cudaStream_t stream = null_stream ? nullptr : static_cast<cudaStream_t>(own);
    Decoder a(kSome, 200, 1), b(kSome, 200, 2);
    a.fill(stream);
    b.fill(stream);
    int wrong[2] = {};
    at_once([&] { wrong[0] = a.wrong_of(kTimes, stream, [&] { return a.attend(); }); },
            [&] { wrong[1] = b.wrong_of(kTimes, stream, [&] { return b.attend(); }); });
    EXPECT_EQ(wrong[0], 0);
    EXPECT_EQ(wrong[1], 0);
  }
}

// One handle, a stream of each thread.
TEST_F(CudaStreams, ThreadsOnTheirPerThreadStreamsGetTheirOwnBits) {
  constexpr int kTimes = 300;
  for (const int batch : {kSome, kFew}) {
    SCOPED_TRACE(batch);
    int wrong[2] = {};
    const auto run = [&](int i) {
      Decoder decoder(batch, 600, static_cast<std::uint64_t>(1 + i));
      decoder.fill(cudaStreamPerThread);
      wrong[i] = decoder.wrong_of(kTimes, cudaStreamPerThread, [&] { return decoder.attend(); });
      EXPECT_EQ(cudaStreamSynchronize(cudaStreamPerThread), cudaSuccess);
    };
    // Serial answers first, then both.
    Decoder a(batch, 600, 1), b(batch, 600, 2);
    a.fill(cudaStreamPerThread);
    b.fill(cudaStreamPerThread);
    at_once([&] { wrong[0] = a.wrong_of(kTimes, cudaStreamPerThread, [&] { return a.attend(); }); },
            [&] { wrong[1] = b.wrong_of(kTimes, cudaStreamPerThread, [&] { return b.attend(); }); });
    EXPECT_EQ(wrong[0], 0);
    EXPECT_EQ(wrong[1], 0);
    // A thread's stream ends with it; its cache, and what others then get, do not suffer from it.
    std::thread([&] { run(0); }).join();
    std::thread([&] { run(1); }).join();
    EXPECT_EQ(wrong[0], 0);
    EXPECT_EQ(wrong[1], 0);
  }
}

TEST_F(CudaStreams, CapturedGraphsReplayedAtOnceGiveTheirOwnBits) {
  constexpr int kTimes = 300;
  const std::pair<int, int> batches[] = {{kSome, kSome}, {kFew, kFew}, {kSome, kMany}, {kFew, kMany}};
  for (const auto& [first, second] : batches) {
    SCOPED_TRACE(::testing::Message() << first << " and " << second << " sequences");
    const Stream s, t;
    Decoder a(first, 600, 1), b(second, 600, 2);
    a.fill(s);
    b.fill(t);
    Replay of_a(a, s), of_b(b, t);
    ASSERT_TRUE(of_a.instantiate() && of_b.instantiate());
    // One after the other.
    EXPECT_EQ(a.wrong_of(2, s, [&] { return of_a(); }), 0);
    EXPECT_EQ(b.wrong_of(2, t, [&] { return of_b(); }), 0);
    int wrong[2] = {};
    at_once([&] { wrong[0] = a.wrong_of(kTimes, s, [&] { return of_a(); }); },
            [&] { wrong[1] = b.wrong_of(kTimes, t, [&] { return of_b(); }); });
    EXPECT_EQ(wrong[0], 0);
    EXPECT_EQ(wrong[1], 0);
    // A graph beside a call of another cache.
    at_once([&] { wrong[0] = a.wrong_of(kTimes, s, [&] { return of_a(); }); },
            [&] { wrong[1] = b.wrong_of(kTimes, t, [&] { return b.attend(); }); });
    EXPECT_EQ(wrong[0], 0);
    EXPECT_EQ(wrong[1], 0);
  }
}

// Steps that store, and between which pages are sealed.
TEST_F(CudaStreams, CapturedStepsReplayedAtOnceGiveTheirOwnBits) {
  constexpr int kSteps = 150;
  const Stream s, t;
  const auto steps_of = [](Decoder& decoder, const Stream& stream) {
    decoder.fill(stream);
    EXPECT_TRUE(decoder.cache().reserve(kSteps).ok());
    Replay replay(decoder, stream, true);
    if (!replay.instantiate()) return std::vector<std::uint8_t>();
    return decoder.outputs_of(kSteps, stream, [&] { return decoder.cache().advance().ok() && replay(); });
  };
  std::vector<std::uint8_t> alone[2], beside[2];
  {
    Decoder a(kSome, 200, 1), b(kFew, 200, 2);
    alone[0] = steps_of(a, s);
    alone[1] = steps_of(b, t);
  }
  Decoder a(kSome, 200, 1), b(kFew, 200, 2);
  at_once([&] { beside[0] = steps_of(a, s); }, [&] { beside[1] = steps_of(b, t); });
  for (const int i : {0, 1}) {
    EXPECT_FALSE(alone[i].empty());
    EXPECT_TRUE(alone[i] == beside[i]) << i;
  }
  EXPECT_GT(a.cache().page_count(0), 2);
}

TEST_F(CudaStreams, CallsOfOtherBatchesBetweenCaptureAndReplayChangeNothing) {
  const std::pair<int, int> batches[] = {{kMany, kSome}, {kSome, kMany}, {kFew, kMany}};
  for (const auto& [captured, between] : batches) {
    SCOPED_TRACE(::testing::Message() << captured << " sequences captured, " << between << " between");
    const Stream s, t;
    Decoder a(captured, 200, 1), b(between, 200, 2);
    a.fill(s);
    Replay of_a(a, s);
    b.fill(t);
    ASSERT_TRUE(of_a.instantiate());
    EXPECT_EQ(a.wrong_of(2, s, [&] { return of_a(); }), 0);
    ASSERT_TRUE(b.attend());
    t.wait();
    EXPECT_EQ(a.wrong_of(2, s, [&] { return of_a(); }), 0);
  }
}

std::size_t in_use() {
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::size_t bytes = 0;
  const Status status = cuda::memory_in_use(0, &bytes);
  EXPECT_TRUE(status.ok()) << status.message();
  return bytes;
}
// CUDA reports destroyed graphs on a thread of its own; the next call then frees their memory.
std::size_t in_use_later(std::size_t wanted) {
  for (int i = 0; i < 500 && in_use() > wanted; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    std::unique_ptr<DeviceTables> tables;
    EXPECT_TRUE(cuda::backend()->make_tables(&tables).ok());
  }
  return in_use();
}

TEST_F(CudaStreams, MemoryIsGivenBackWithTheLastCacheAndGraph) {
  const std::size_t before = in_use();
  {
    const Stream streams[3];
    std::vector<std::unique_ptr<Decoder>> decoders;
    std::vector<std::unique_ptr<Replay>> replays;
    for (const Stream& s : streams)
      for (const int batch : {kFew, kSome}) {
        decoders.push_back(std::make_unique<Decoder>(batch, 200, decoders.size()));
        decoders.back()->fill(s);
        for (int i = 0; i < 2; ++i) {
          replays.push_back(std::make_unique<Replay>(*decoders.back(), s));
          ASSERT_TRUE(replays.back()->instantiate());
          EXPECT_EQ(decoders.back()->wrong_of(2, s, [&] { return (*replays.back())(); }), 0);
        }
      }
    EXPECT_GT(in_use(), before);
    // To another stream, and gone from there.
    decoders[0]->cache().set_stream(streams[1]);
    EXPECT_TRUE(decoders[0]->attend());
    const std::size_t all = in_use();
    decoders.clear();
    const std::size_t of_graphs = in_use();
    EXPECT_LT(of_graphs, all);
    EXPECT_GT(of_graphs, before);  // a graph has its own, whatever became of the cache
    cuda::set_stream(nullptr);
    replays.clear();
    EXPECT_EQ(in_use_later(before), before);
  }
}

TEST_F(CudaStreams, ThreadsThatEndAndCapturesMadeAnewLeaveNothingBehind) {
  const Stream s;
  Decoder decoder(kFew, 200, 1);
  decoder.fill(s);
  const std::size_t before = in_use();
  for (int i = 0; i < 20; ++i) {
    std::thread([&] {
      Decoder other(kFew, 200, 2);
      other.fill(cudaStreamPerThread);
    }).join();
    Replay again(decoder, s);
    ASSERT_TRUE(again.instantiate());
    EXPECT_EQ(decoder.wrong_of(1, s, [&] { return again(); }), 0);
  }
  EXPECT_EQ(in_use_later(before), before);
}

// While one thread captures so that no other may do what is unsafe then, caches elsewhere go on, and the capture holds.
TEST_F(CudaStreams, OthersGoOnWhileAStreamIsCaptured) {
  const Stream s, t;
  Decoder a(kSome, 200, 1), b(kSome, 200, 2);
  a.fill(s);
  b.fill(t);
  ASSERT_EQ(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_TRUE(a.attend());
  std::thread([&] {
    // Tables that travel by staging, notes, a window that grows.
    for (int i = 0; i < 100; ++i) {
      const Status appended = b.cache().append(b.rows(1), b.rows(1));
      ASSERT_TRUE(appended.ok()) << appended.message();
      ASSERT_TRUE(b.attend());
    }
    const Status cropped = b.cache().crop(200);
    EXPECT_TRUE(cropped.ok()) << cropped.message();
  }).join();
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(s, &graph), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

// What a cache is given is there when create() returns, whatever this thread's last call was queued on.
TEST_F(CudaStreams, ANewCacheIsWholeOnAnyStream) {
  const Stream busy, s;
  Decoder last(1, 10, 3);
  struct Gate {
    std::mutex mutex;
    std::condition_variable changed;
    bool open = false, timed_out = false;
  } gate;
  const auto wait = [](void* at) {
    auto& g = *static_cast<Gate*>(at);
    std::unique_lock<std::mutex> lock(g.mutex);
    g.timed_out =
        !g.changed.wait_for(lock, std::chrono::seconds(5), [&g] { return g.open; });  // should what follows wait for it
  };
  ASSERT_EQ(cudaLaunchHostFunc(busy, wait, &gate), cudaSuccess);
  last.cache().set_stream(busy);
  const CacheConfig config = config_of(7);
  std::unique_ptr<Cache> cache;
  const Status status = Cache::create(config, &cache);
  ASSERT_TRUE(status.ok()) << status.message();
  cache->set_stream(s);
  ASSERT_TRUE(cache->append(last.rows(10), last.rows(10)).ok());
  std::vector<float> there;
  ASSERT_TRUE(cache->lambda(0, &there).ok());
  EXPECT_EQ(there, config.lambda_k);
  {
    const std::lock_guard<std::mutex> lock(gate.mutex);
    gate.open = true;
  }
  gate.changed.notify_all();
  busy.wait();
  EXPECT_FALSE(gate.timed_out);
}

TEST_F(CudaStreams, ANewCacheAsksNothingOfAStreamThatIsGone) {
  {
    const Stream gone;
    Decoder last(1, 10, 3);
    last.cache().set_stream(gone);
    ASSERT_TRUE(last.cache().append(last.rows(10), last.rows(10)).ok());
  }
  std::unique_ptr<Cache> cache;
  const Status status = Cache::create(config_of(7), &cache);
  EXPECT_TRUE(status.ok()) << status.message();
}

// Pinned memory too, whose copies CUDA queues.
TEST_F(CudaStreams, ACopyToOrFromTheHostIsDoneWhenItReturns) {
  const Stream s;
  cuda::set_stream(s);
  Backend& backend = *cuda::backend();
  constexpr std::size_t kBytes = 4096;
  const DeviceBytes device(std::vector<std::uint8_t>(kBytes, 7));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  void* pinned = nullptr;
  ASSERT_EQ(cudaMallocHost(&pinned, kBytes), cudaSuccess);
  auto* const host = static_cast<std::uint8_t*>(pinned);
  const auto hold = [&s] {
    return cudaLaunchHostFunc(s, [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(50)); }, nullptr);
  };
  std::fill(host, host + kBytes, std::uint8_t{0});
  ASSERT_EQ(hold(), cudaSuccess);
  ASSERT_TRUE(backend.copy(host, device.as(), kBytes).ok());
  EXPECT_EQ(std::count(host, host + kBytes, 7), static_cast<std::ptrdiff_t>(kBytes));
  std::fill(host, host + kBytes, std::uint8_t{9});
  ASSERT_EQ(hold(), cudaSuccess);
  ASSERT_TRUE(backend.copy(device.as(), host, kBytes).ok());
  std::fill(host, host + kBytes, std::uint8_t{0});  // may be reused
  EXPECT_EQ(device.read(), std::vector<std::uint8_t>(kBytes, 9));
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
}

// A device that has failed: a saved file would carry checksums of what nobody wrote.
using CudaStreamsDeathTest = CudaStreams;
TEST_F(CudaStreamsDeathTest, SaveRefusesWithTheErrorOfTheDevice) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  const auto fault_and_save = [] {
    auto decoder = std::make_unique<Decoder>(2, 200, 1);
    decoder->fill(nullptr);
    const std::uint32_t word = 0;
    bool before = decoder->cache().save([](std::span<const std::byte>) { return Status(); }).ok();
    if (cuda::launch_put(reinterpret_cast<void*>(64), &word, sizeof(word), nullptr) != cudaSuccess) before = false;
    const Status status = decoder->cache().save([](std::span<const std::byte>) { return Status(); });
    std::fprintf(stderr, "before: %s; after: %s\n", before ? "saved" : "failed",
                 status.ok() ? "saved" : status.message().c_str());
    std::_Exit(0);  // nothing of the device can be given back any more
  };
  EXPECT_EXIT(fault_and_save(), ::testing::ExitedWithCode(0),
              "before: saved; after: .*expected success; got an illegal memory access was encountered");
}

}  // namespace
}  // namespace kv4
