// A long random use of caches: many sequences, on several threads, whose caches begin as clones of one and share its
// pages. What is held is compared with what was appended, and when all caches are gone the bytes that the process holds
// are what they were.
//
//   kv4_soak [--operations 1000000] [--threads 2] [--rounds 10] [--seed N]
//
// The seed is printed first: with it each thread makes the same calls again.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "cases.h"
#include "format/convert.h"
#include "held_bytes.h"
#include "kv4/cache.h"
#include "kv4/cpu.h"

namespace {

using namespace kv4;

constexpr std::int64_t kMostTokens = 500, kMostRows = 10, kDim = 32;
constexpr int kKvHeads = 1, kGroup = 2;

// The first promise that was broken, of any thread.
struct Failure {
  std::atomic<bool> happened{false};
  std::string text;
  void note(std::string what) {
    if (!happened.exchange(true)) text = std::move(what);
  }
};
Failure g_failure;

CacheConfig config_of(int kind) {
  CacheConfig c;
  c.kv_heads = kKvHeads;
  c.head_dim_k = c.head_dim_v = kDim;
  if (kind == 1) c.recipe = Recipe::exact();
  if (kind == 2) c.recipe = Recipe::paper();
  if (kind == 3) c.sliding_window = 150;
  if (kind == 4) c.dtype = DType::bf16;
  if (kind == 5) c.recipe.refined = 2;
  return c;
}
constexpr int kKinds = 6;

// A channel of a token: a multiple of 1/128, which every dtype holds.
float channel(std::uint32_t tag, std::int64_t c) {
  const std::uint32_t x = (tag + static_cast<std::uint32_t>(c) * 0x9e3779b9u) * 0x85ebca6bu;
  return static_cast<float>((x >> 24) & 0xffu) / 128 - 1;
}

// One sequence: a tag for each token, and from where on they are as they were appended.
struct Row {
  std::vector<std::uint32_t> tags;
  std::int64_t exact_from = 0;
  std::int64_t length() const { return static_cast<std::int64_t>(tags.size()); }
};

struct Family {
  CacheConfig config;
  std::unique_ptr<Cache> cache;
  std::vector<Row> rows;
  int batch() const { return static_cast<int>(rows.size()); }
};

Family fork_of(const Family& other) {
  Family copy{other.config, nullptr, other.rows};
  if (!other.cache->clone(&copy.cache).ok()) g_failure.note("a clone");
  return copy;
}

enum Kind { kAppend, kAttend, kFork, kCrop, kSave, kSequences, kOther, kKindCount };
constexpr const char* kNames[] = {
    "appends", "attends", "forks", "crops", "saves and loads", "sequences that come or go", "others"};

class Worker {
 public:
  Worker(std::vector<Family> families, std::uint64_t seed) : families_(std::move(families)), random_(seed) {}

  void run(long operations) {
    for (long i = 0; i < operations && !g_failure.happened; ++i) {
      const auto which = static_cast<std::size_t>(random_.below(static_cast<int>(families_.size())));
      operation(families_[which]);
      check(families_[which], i);
    }
  }
  const long* counts() const { return counts_; }

  // New tokens, noted in the family's rows.
  static void append_to(Family& f, const std::vector<RowCount>& counts, cases::Random& random) {
    std::int64_t total = 0;
    for (const RowCount& each : counts) total += each.tokens;
    std::vector<std::byte> x;
    for (const RowCount& each : counts)
      for (std::int64_t i = 0; i < each.tokens; ++i) {
        const auto tag = static_cast<std::uint32_t>(random.bits());
        f.rows[static_cast<std::size_t>(each.row)].tags.push_back(tag);
        for (std::int64_t c = 0; c < kDim; ++c) put(f.config.dtype, channel(tag, c), &x);
      }
    const TensorView view{x.data(), f.config.dtype, {1, kKvHeads, total, kDim}, {0, 0, kDim, 1}};
    expect(f.cache->append(counts, view, view), "append");
  }

 private:
  static void expect(const Status& status, const char* what) {
    if (!status.ok()) g_failure.note(std::string(what) + ": " + status.message());
  }

  void operation(Family& f) {
    const int kind = random_.below(100);
    if (kind < 60) append(f);
    else if (kind < 70) attend(f);
    else if (kind < 76) fork(f);
    else if (kind < 84) crop(f);
    else if (kind < 86) reload(f);
    else if (kind < 94) sequences(f);
    else other(f);
  }

  void append(Family& f) {
    std::vector<RowCount> counts;
    const std::int64_t most = random_.below(16) == 0 ? 100 : 1;
    for (int b = 0; b < f.batch(); ++b) {
      const std::int64_t n = most == 1 ? 1 : 1 + random_.below(static_cast<int>(most));
      if (f.rows[static_cast<std::size_t>(b)].length() + n > kMostTokens || random_.below(3) == 0) continue;
      counts.push_back({b, n});
    }
    if (counts.empty()) return remove_longest(f);
    append_to(f, counts, random_);
    ++counts_[kAppend];
  }
  static void put(DType dtype, float x, std::vector<std::byte>* to) {
    const std::uint16_t half = f32_to_bf16(x);
    const auto* from = dtype == DType::f32 ? reinterpret_cast<const std::byte*>(&x)
                                           : reinterpret_cast<const std::byte*>(&half);
    to->insert(to->end(), from, from + size_of(dtype));
  }

  void attend(Family& f) {
    std::vector<RowCount> counts;
    for (int b = 0; b < f.batch(); ++b)
      if (f.rows[static_cast<std::size_t>(b)].length() > 0) counts.push_back({b, 1});
    if (counts.empty()) return;
    const auto n = static_cast<std::int64_t>(counts.size());
    std::vector<float> q(static_cast<std::size_t>(kKvHeads * kGroup * n * kDim)), out(q.size());
    for (float& x : q) x = static_cast<float>(random_.uniform() - 0.5);
    AttendArgs args;
    args.q = {q.data(), DType::f32, {1, kKvHeads * kGroup, n, kDim}, {0, n * kDim, kDim, 1}};
    expect(f.cache->attend(counts, args, {out.data(), DType::f32, args.q.shape, args.q.stride}), "attend");
    // Values lie within [-1, 1): their means do, but for what four bits lose.
    for (const float x : out)
      if (!(x > -3 && x < 3)) return g_failure.note("attend: expected a mean of values; got " + std::to_string(x));
    ++counts_[kAttend];
  }

  // Another family continues from here; the one in its place is destroyed.
  void fork(Family& f) {
    Family copy = fork_of(f);
    families_[static_cast<std::size_t>(random_.below(static_cast<int>(families_.size())))] = std::move(copy);
    ++counts_[kFork];
  }

  void crop(Family& f) {
    if (f.batch() == 0) return;
    const int row = random_.below(f.batch());
    Row& r = f.rows[static_cast<std::size_t>(row)];
    const std::int64_t n = std::max<std::int64_t>(
        0, r.length() - (random_.below(4) > 0 ? random_.below(8) : random_.below(static_cast<int>(kMostTokens))));
    const Status status = f.cache->crop(row, n);
    if (f.config.sliding_window > 0 && status.code() == StatusCode::out_of_range) return;  // what it needs is evicted
    expect(status, "crop");
    r.tags.resize(static_cast<std::size_t>(n));
    r.exact_from = n;  // a page that was opened again holds what its codes say
    ++counts_[kCrop];
  }

  void reload(Family& f) {
    std::vector<std::byte> bytes;
    expect(f.cache->save([&](std::span<const std::byte> x) {
      bytes.insert(bytes.end(), x.begin(), x.end());
      return Status();
    }),
           "save");
    std::unique_ptr<Cache> fresh;
    expect(Cache::create(f.config, &fresh), "create");
    std::size_t at = 0;
    expect(fresh->load([&](std::span<std::byte> to) {
      if (to.size() > bytes.size() - at) return Status(StatusCode::out_of_range, "its end");
      std::memcpy(to.data(), bytes.data() + at, to.size());
      at += to.size();
      return Status();
    }),
           "load");
    f.cache = std::move(fresh);
    ++counts_[kSave];
  }

  void sequences(Family& f) {
    ++counts_[kSequences];
    if (f.batch() < kMostRows && random_.below(2) == 0) {
      expect(f.cache->add(1), "add");
      f.rows.emplace_back();
    } else if (f.batch() > 0 && f.batch() * 2 <= kMostRows && random_.below(2) == 0) {
      expect(f.cache->extend(*f.cache), "extend");
      const std::vector<Row> same = f.rows;
      f.rows.insert(f.rows.end(), same.begin(), same.end());
    } else if (f.batch() > 0) {
      const std::int64_t row = random_.below(f.batch());
      expect(f.cache->remove(std::vector<std::int64_t>{row}), "remove");
      f.rows.erase(f.rows.begin() + row);
    }
  }
  void remove_longest(Family& f) {
    if (f.batch() == 0) return sequences(f);
    const auto longest = std::max_element(f.rows.begin(), f.rows.end(),
                                          [](const Row& a, const Row& b) { return a.length() < b.length(); });
    expect(f.cache->remove(std::vector<std::int64_t>{longest - f.rows.begin()}), "remove");
    f.rows.erase(longest);
  }
  void other(Family& f) {
    ++counts_[kOther];
    switch (random_.below(4)) {
      case 0: expect(f.cache->seal(), "seal"); break;
      case 1:
        if (f.cache->length() > 0) expect(f.cache->reserve(random_.below(100)), "reserve");
        break;
      case 2:
        if (random_.below(20) == 0) {
          f.cache->reset();
          f.rows.clear();
        }
        break;
      default: {
        if (f.batch() == 0) return;
        std::vector<std::int64_t> rows(static_cast<std::size_t>(1 + random_.below(static_cast<int>(kMostRows))));
        std::vector<Row> next;
        for (std::int64_t& row : rows) {
          row = random_.below(f.batch());
          next.push_back(f.rows[static_cast<std::size_t>(row)]);
        }
        expect(f.cache->select(rows), "select");
        f.rows = std::move(next);
      }
    }
  }

  // Lengths always; now and then four tokens of a sequence: the newest, or any where all are packed.
  void check(const Family& f, long operation) {
    if (f.cache->batch() != f.batch()) return g_failure.note("batch");
    for (int b = 0; b < f.batch(); ++b)
      if (f.cache->length(b) != f.rows[static_cast<std::size_t>(b)].length()) return g_failure.note("length");
    if (operation % 32 != 0 || f.batch() == 0) return;
    const std::int64_t row = random_.below(f.batch());
    const Row& r = f.rows[static_cast<std::size_t>(row)];
    const bool packed = f.config.recipe.seal == SealMode::arrival;
    std::int64_t first = std::max(r.exact_from, r.length() - 4);
    if (packed && r.length() > 0) first = random_.below(static_cast<int>(r.length()));
    const std::int64_t n = std::min<std::int64_t>(4, r.length() - first);
    if (n <= 0) return;
    std::unique_ptr<Cache> alone;
    expect(f.cache->clone(&alone), "clone");
    expect(alone->select(std::vector<std::int64_t>{row}), "select");
    std::vector<float> held(static_cast<std::size_t>(n * kDim));
    expect(alone->dense_keys(first, n, {held.data(), DType::f32, {1, kKvHeads, n, kDim}, {0, 0, kDim, 1}}), "dense");
    for (std::int64_t i = 0; i < n; ++i) {
      double error = 0, square = 0;
      for (std::int64_t c = 0; c < kDim; ++c) {
        const double x = channel(r.tags[static_cast<std::size_t>(first + i)], c);
        error += std::pow(held[static_cast<std::size_t>(i * kDim + c)] - x, 2);
        square += x * x;
      }
      // Each of the kDim rotated channels is off by half a step at most, which is 1/14 of the largest; 1 % for the
      // scale's rounding. Two tokens that have nothing to do with each other are sqrt(2) of a norm apart.
      if (error > (packed ? kDim / 196.0 * 1.01 * square : 0))
        return g_failure.note("a token is not what was appended");
    }
  }

  std::vector<Family> families_;
  cases::Random random_;
  long counts_[kKindCount] = {};
};

// A cache of each kind with tokens of two sequences, pages among them: every thread gets clones, which share those.
std::vector<Family> beginnings(std::uint64_t seed) {
  std::vector<Family> list;
  cases::Random random(seed);
  for (int kind = 0; kind < kKinds; ++kind) {
    Family f{config_of(kind), nullptr, std::vector<Row>(2)};
    if (!Cache::create(f.config, &f.cache).ok() || !f.cache->add(2).ok()) g_failure.note("create");
    for (int i = 0; i < 8; ++i) Worker::append_to(f, {{0, 30}, {1, 30}}, random);
    list.push_back(std::move(f));
  }
  return list;
}

struct Options {
  long operations = 1000000, threads = 2, rounds = 10;
  std::uint64_t seed = 0;
};

void one_round(const Options& options, std::uint64_t round, long* counts) {
  std::vector<Family> first = beginnings(options.seed + round);
  std::vector<std::unique_ptr<Worker>> workers;
  for (long t = 0; t < options.threads; ++t) {
    std::vector<Family> own;
    for (const Family& f : first) own.push_back(fork_of(f));
    workers.push_back(
        std::make_unique<Worker>(std::move(own), options.seed + 1000 * (round + 1) + static_cast<std::uint64_t>(t)));
  }
  first.clear();
  const long each = std::max(1l, options.operations / options.rounds / options.threads);
  std::vector<std::thread> threads;
  for (auto& worker : workers) threads.emplace_back([&worker, each] { worker->run(each); });
  for (std::thread& t : threads) t.join();
  for (const auto& worker : workers)
    for (int k = 0; k < kKindCount; ++k) counts[k] += worker->counts()[k];
}

// A sanitizer keeps what is freed.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

// KiB of memory that the process has in use, with what the allocator keeps given back first; 0 where nothing says so.
long resident() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
  if (kSanitized) return 0;
  std::ifstream file("/proc/self/statm");
  long pages = 0, held = 0;
  return file >> pages >> held ? held * 4 : 0;
}

bool parse(int argc, char** argv, Options* out) {
  out->seed = static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()) % 1000000;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const long value = std::atol(argv[i + 1]);
    if (name == "--operations" && value > 0) out->operations = value;
    else if (name == "--threads" && value > 0) out->threads = value;
    else if (name == "--rounds" && value > 1) out->rounds = value;
    else if (name == "--seed") out->seed = static_cast<std::uint64_t>(value);
    else return false;
  }
  return argc % 2 == 1;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, &options) || !cpu::set_num_threads(1).ok()) {
    std::fprintf(stderr, "expected --operations, --threads, --rounds (2 or more) and --seed with numbers\n");
    return 2;
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(options.seed));
  std::fflush(stdout);
  long counts[kKindCount] = {};
  long held_before = 0, first_half = 0, second_half = 0;
  for (long round = 0; round < options.rounds && !g_failure.happened; ++round) {
    one_round(options, static_cast<std::uint64_t>(round), counts);
    const long held = held_bytes(), now = resident();
    if (round == 0) held_before = held;  // tables that the process keeps are there
    long& most = 2 * round < options.rounds ? first_half : second_half;
    most = std::max(most, now);
    if (held != held_before)
      g_failure.note("bytes held after round " + std::to_string(round) + ": expected " + std::to_string(held_before) +
                     "; got " + std::to_string(held));
  }
  // Operator new's bytes are counted to the last. What is mapped past it comes by 2 MiB, and the allocator keeps a few
  // MiB for each thread, as it happens to need them.
  const long allowed = first_half + 16 * 1024;
  if (first_half > 0 && second_half > allowed)
    g_failure.note("resident memory: expected at most " + std::to_string(allowed) + " KiB in the second half; got " +
                   std::to_string(second_half));
  for (int k = 0; k < kKindCount; ++k) std::printf("%ld %s%s", counts[k], kNames[k], k + 1 < kKindCount ? ", " : "\n");
  std::printf("%ld bytes held between rounds; resident at most %ld KiB in the first half, %ld in the second\n",
              held_before, first_half, second_half);
  if (g_failure.happened) {
    std::fprintf(stderr, "seed %llu: %s\n", static_cast<unsigned long long>(options.seed), g_failure.text.c_str());
    return 1;
  }
  return 0;
}
