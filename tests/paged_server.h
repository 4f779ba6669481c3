// A server that owns its memory: pools of pages and blocks, tables, sequences that come and go, all through
// kv4/paged.h, on any backend. What each call answers is compared with the backend's attention over plain views of the
// same tokens: pages one by one, rows gathered.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/spec.h"
#include "cases.h"
#include "format/convert.h"
#include "kv4/paged.h"

namespace kv4::tests {

// Backend memory, zeroed.
class Held {
 public:
  Held(Backend& backend, std::size_t bytes)
      : backend_(backend), bytes_(bytes), data_(static_cast<std::byte*>(backend.alloc(bytes))) {
    EXPECT_NE(data_, nullptr);
    EXPECT_TRUE(backend.clear(data_, bytes).ok());
  }
  ~Held() { backend_.free(data_, bytes_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::span<std::byte> span() const { return {data_, bytes_}; }
  template <class T>
  void put(const std::vector<T>& values) {
    ASSERT_LE(values.size() * sizeof(T), bytes_);
    if (values.empty()) return;
    EXPECT_TRUE(backend_.copy(data_, values.data(), values.size() * sizeof(T)).ok());
  }
  std::vector<std::uint8_t> read() const {
    std::vector<std::uint8_t> out(bytes_);
    EXPECT_TRUE(backend_.copy(out.data(), data_, bytes_).ok());
    return out;
  }

 private:
  Backend& backend_;
  std::size_t bytes_;
  std::byte* data_;
};

struct ServerShape {
  std::string backend = "cpu";
  int kv_heads = 2, group = 3, dim = 64;
  DType dtype = DType::f16;
  int sinks = 4, window = 0;
  bool lambda = true, lambda_per_sequence = false;
  int exact = 64;  // newest tokens that stay exact at least
  int bits_k = 4, bits_v = 4, refined = 0;
};

class PagedServer {
 public:
  static constexpr int kPages = 160, kBlocks = 64, kMost = 6, kTable = 40;  // pools, sequences, entries of a table

  explicit PagedServer(const ServerShape& shape, std::uint64_t seed)
      : shape_(shape), random_(seed), backend_(*find_backend(shape.backend)) {
    CacheConfig config;
    config.recipe = Recipe::kv4();
    config.recipe.key.bits = shape.bits_k;
    config.recipe.value.bits = shape.bits_v;
    config.recipe.refined = shape.refined;
    config.dtype = shape.dtype;
    config.kv_heads = shape.kv_heads;
    config.head_dim_k = config.head_dim_v = shape.dim;
    config.backend = shape.backend;
    EXPECT_TRUE(PageFormat::create(config, &format).ok());
    Backend* same = nullptr;
    EXPECT_TRUE(make_spec(config, &same, &spec).ok());
    PageFormat::Limits limits{.sequences = kMost,
                              .q_heads = shape.kv_heads * shape.group,
                              .most_pages = 4,
                              .most_queries = 80,
                              .longest = kTable * kPageTokens,
                              .all = kMost * kTable * kPageTokens};
    std::size_t bytes = 0;
    EXPECT_TRUE(format->workspace_bytes(limits, &bytes).ok());
    workspace = std::make_unique<Held>(backend_, bytes);
    EXPECT_TRUE(format->prepare(workspace->span()).ok());
    pages = std::make_unique<Held>(backend_, kPages * format->page_bytes());
    blocks = std::make_unique<Held>(backend_, kBlocks * format->block_bytes());
    tables = std::make_unique<Held>(backend_, kMost * (2 * kTable + 8) * sizeof(std::int32_t));
    std::vector<float> values;
    for (int i = 0; i < 2 * kMost * row(); ++i) values.push_back(static_cast<float>(0.5 + random_.uniform()));
    lambda = std::make_unique<Held>(backend_, values.size() * sizeof(float));
    lambda->put(values);
    for (int i = kPages; i-- > 0;) free_pages_.push_back((i * 37) % kPages);
    for (int i = kBlocks; i-- > 0;) free_blocks_.push_back((i * 23) % kBlocks);
  }

  struct Sequence {
    std::int64_t length = 0, sealed = 0;
    std::vector<std::int32_t> pages = std::vector<std::int32_t>(kTable, -7),
                              blocks = std::vector<std::int32_t>(kTable, -7);
    std::int32_t sinks = -1;
    int lambda = 0;
  };

  void add() {
    Sequence s;
    s.lambda = random_.below(kMost);
    sequences.push_back(s);
  }
  void remove(std::size_t i) {
    Sequence& s = sequences[i];
    for (std::int64_t p = 0; p < s.sealed / kPageTokens; ++p)
      free_pages_.push_back(s.pages[static_cast<std::size_t>(p)]);
    for (std::int64_t p = s.sealed / kPageTokens; p * kPageTokens < s.length; ++p)
      free_blocks_.push_back(s.blocks[static_cast<std::size_t>(p)]);
    if (s.sinks >= 0) free_blocks_.push_back(s.sinks);
    sequences.erase(sequences.begin() + static_cast<std::ptrdiff_t>(i));
  }

  // How a step calls the operations: one by one, attention's state as it is; or all of them at once.
  enum class Calls { separate, partial, together };

  // New tokens of each of `chosen` (counts may be 0), stored, attended to and sealed as far as due. The call's rows
  // behind those of the sequences stay as they are.
  void step(const std::vector<std::size_t>& chosen, const std::vector<int>& counts, float softcap = 0,
            Calls calls = Calls::separate) {
    int rows = 0;
    std::vector<std::int32_t> queries{0};
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      Sequence& s = sequences[chosen[i]];
      for (std::int64_t b = s.length / kPageTokens; b * kPageTokens < s.length + counts[i]; ++b) {
        std::int32_t& block = s.blocks[static_cast<std::size_t>(b)];
        const bool fresh = b * kPageTokens >= s.length;
        if (fresh) block = take(free_blocks_);
      }
      s.length += counts[i];
      rows += counts[i];
      queries.push_back(rows);
    }
    const int all = rows + 2, heads = shape_.kv_heads * shape_.group;
    Held k(backend_, bytes_of(shape_.kv_heads, all)), v(backend_, bytes_of(shape_.kv_heads, all)),
        q(backend_, bytes_of(heads, all));
    for (Held* x : {&k, &v, &q}) x->put(halves(x->span().size() / 2));
    const TensorView keys = view(k, shape_.kv_heads, all), values = view(v, shape_.kv_heads, all);
    const Due due = due_of(chosen);
    const PagedBatch batch = batch_of(chosen, queries);
    const bool partial = calls == Calls::partial, together = calls == Calls::together && !chosen.empty();
    if (!together) {
      ASSERT_TRUE(ok(format->store(batch, keys, values, workspace->span())));
    }
    attend(batch, chosen, queries, q, all, softcap, partial, [&](const AttendArgs& args, const MutableTensorView& out) {
      return together ? format->step(batch, keys, values, due.range, args, out, workspace->span())
                      : format->attend(batch, args, out, workspace->span());
    });
    if (::testing::Test::HasFatalFailure()) return;
    if (!together) {
      ASSERT_TRUE(ok(format->seal(batch, due.range, workspace->span())));
    }
    sealed(batch, chosen, due);
  }

  PagedBatch batch_of(const std::vector<std::size_t>& chosen, const std::vector<std::int32_t>& queries) {
    std::vector<std::int32_t> numbers;
    const auto begin = [&] { return tables->as<std::int32_t>() + numbers.size(); };
    PagedBatch batch;
    batch.size = static_cast<int>(chosen.size());
    batch.pages = begin();
    for (std::size_t i : chosen) numbers.insert(numbers.end(), sequences[i].pages.begin(), sequences[i].pages.end());
    batch.blocks = begin();
    for (std::size_t i : chosen) numbers.insert(numbers.end(), sequences[i].blocks.begin(), sequences[i].blocks.end());
    batch.pages_stride = batch.blocks_stride = kTable;
    batch.queries = begin();
    numbers.insert(numbers.end(), queries.begin(), queries.end());
    batch.lengths = begin();
    for (std::size_t i : chosen) numbers.push_back(static_cast<std::int32_t>(sequences[i].length));
    batch.sealed = begin();
    for (std::size_t i : chosen) numbers.push_back(static_cast<std::int32_t>(sequences[i].sealed));
    if (shape_.sinks > 0) batch.sinks = begin();
    for (std::size_t i : chosen) numbers.push_back(sequences[i].sinks);
    tables->put(numbers);
    batch.sink_tokens = shape_.sinks;
    batch.window = shape_.window;
    batch.page_memory.data = pages->as<std::uint8_t>();
    batch.page_memory.page_stride = static_cast<std::int64_t>(format->page_bytes());
    batch.page_memory.head_stride = static_cast<std::int64_t>(format->head_bytes());
    batch.page_count = kPages;
    batch.block_count = kBlocks;
    // A block: keys of all heads, values of all heads.
    const std::int64_t half = kPageTokens * row();
    batch.row_memory = {blocks->as<std::uint16_t>(), blocks->as<std::uint16_t>() + half, 2 * half,   2 * half,
                        kPageTokens * shape_.dim,    kPageTokens * shape_.dim,           shape_.dim, shape_.dim};
    if (shape_.lambda) {
      const std::int64_t stride = 2 * row();
      if (shape_.lambda_per_sequence) {
        // Sequences of a call lie one stride apart: it is the order of the call that counts.
        for (std::size_t i = 0; i < chosen.size(); ++i) sequences[chosen[i]].lambda = static_cast<int>(chosen[i]);
        const bool ordered = chosen.size() < 2 || std::is_sorted(chosen.begin(), chosen.end());
        EXPECT_TRUE(ordered && (chosen.empty() || chosen.back() - chosen.front() + 1 == chosen.size()))
            << "neighbours, for this test's strides";
      }
      const std::int64_t first =
          shape_.lambda_per_sequence && !chosen.empty() ? static_cast<std::int64_t>(chosen.front()) * stride : 0;
      batch.lambda_k = lambda->as<float>() + first;
      batch.lambda_v = lambda->as<float>() + first + row();
      batch.lambda_k_stride = batch.lambda_v_stride = shape_.lambda_per_sequence ? stride : 0;
    }
    batch.most_queries = 80;
    batch.longest = kTable * kPageTokens;
    batch.all = kMost * kTable * kPageTokens;
    return batch;
  }

  // Pages of each that are to be sealed after its new rows, their ids in its table.
  struct Due {
    std::vector<std::int32_t> begin, end;
    std::unique_ptr<Held> numbers;
    PageRange range;
  };
  Due due_of(const std::vector<std::size_t>& chosen) {
    Due due;
    for (std::size_t i : chosen) {
      Sequence& s = sequences[i];
      const std::int64_t end =
          std::min(std::max<std::int64_t>(s.sealed, (s.length - shape_.exact) / kPageTokens * kPageTokens),
                   s.sealed + 4 * kPageTokens);
      due.begin.push_back(static_cast<std::int32_t>(s.sealed));
      due.end.push_back(static_cast<std::int32_t>(end));
      for (std::int64_t p = s.sealed / kPageTokens; p < end / kPageTokens; ++p)
        s.pages[static_cast<std::size_t>(p)] = take(free_pages_);
    }
    due.numbers = std::make_unique<Held>(backend_, (2 * chosen.size() + 1) * sizeof(std::int32_t));
    std::vector<std::int32_t> numbers = due.begin;
    numbers.insert(numbers.end(), due.end.begin(), due.end.end());
    due.numbers->put(numbers);
    const auto* at = due.numbers->as<std::int32_t>();
    due.range = {at, at + chosen.size(), 4};
    return due;
  }
  // They are sealed: gives their blocks back but the one with the sinks.
  void sealed(const PagedBatch& batch, const std::vector<std::size_t>& chosen, const Due& due) {
    for (std::size_t n = 0; n < chosen.size(); ++n)
      check_sealed(batch, static_cast<int>(n), sequences[chosen[n]], due.begin[n], due.end[n]);
    for (std::size_t n = 0; n < chosen.size(); ++n) {
      Sequence& s = sequences[chosen[n]];
      for (std::int64_t p = due.begin[n] / kPageTokens; p < due.end[n] / kPageTokens; ++p) {
        std::int32_t& block = s.blocks[static_cast<std::size_t>(p)];
        if (p == 0 && shape_.sinks > 0) s.sinks = block;
        else free_blocks_.push_back(block);
        block = -9;
      }
      s.sealed = due.end[n];
    }
  }

  Backend& backend() { return backend_; }
  int row() const { return shape_.kv_heads * shape_.dim; }

  std::unique_ptr<PageFormat> format;
  PageSpec spec;
  std::unique_ptr<Held> workspace, pages, blocks, tables, lambda;
  std::vector<Sequence> sequences;

 private:
  static bool ok(const Status& status) {
    EXPECT_TRUE(status.ok()) << status.message();
    return status.ok();
  }
  std::int32_t take(std::vector<std::int32_t>& free) {
    EXPECT_FALSE(free.empty());
    const std::int32_t id = free.back();
    free.pop_back();
    return id;
  }
  std::size_t bytes_of(int heads, int rows) const {
    return static_cast<std::size_t>(heads) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(shape_.dim) * 2;
  }
  std::vector<std::uint16_t> halves(std::size_t count) {
    std::vector<std::uint16_t> out(count);
    for (std::uint16_t& x : out) {
      const float f = static_cast<float>(random_.normal());
      x = shape_.dtype == DType::f16 ? f32_to_f16(f) : f32_to_bf16(f);
    }
    return out;
  }
  // [1, heads, rows, dim] that lies [rows, heads, dim].
  TensorView view(const Held& x, int heads, int rows) const {
    return {x.as<void>(),
            shape_.dtype,
            {1, heads, rows, shape_.dim},
            {0, shape_.dim, static_cast<std::int64_t>(heads) * shape_.dim, 1}};
  }

  // Rows [begin, begin + count), gathered from the blocks of `table`: keys of all heads, then values.
  void gather(std::int64_t begin, const std::vector<std::int32_t>& table, std::int64_t count, Held& to) {
    const std::size_t line = static_cast<std::size_t>(shape_.dim) * 2;
    for (int side = 0; side < 2; ++side)
      for (int h = 0; h < shape_.kv_heads; ++h)
        for (std::int64_t r = begin; r < begin + count; ++r) {
          const std::byte* block = blocks->as<std::byte>() +
                                   static_cast<std::size_t>(table[static_cast<std::size_t>(r / kPageTokens)]) *
                                       format->block_bytes();
          const std::byte* from = block + (static_cast<std::size_t>(side * shape_.kv_heads + h) * kPageTokens +
                                           static_cast<std::size_t>(r % kPageTokens)) *
                                              line;
          std::byte* at = to.as<std::byte>() +
                          (static_cast<std::size_t>(side * shape_.kv_heads + h) * static_cast<std::size_t>(count) +
                           static_cast<std::size_t>(r - begin)) *
                              line;
          EXPECT_TRUE(backend_.copy(at, from, line).ok());
        }
  }
  ExactRows rows_of(const Held& x, std::int64_t position, std::int64_t count) const {
    ExactRows r;
    r.k = x.as<void>();
    r.v = x.as<std::byte>() + static_cast<std::size_t>(count) * static_cast<std::size_t>(row()) * 2;
    r.k_head_stride = r.v_head_stride = count * shape_.dim;
    r.k_stride = r.v_stride = shape_.dim;
    r.position = position;
    r.count = count;
    return r;
  }

  // whole(args, out): the call that is tested, unless it is attend_partial.
  template <class Whole>
  void attend(const PagedBatch& batch, const std::vector<std::size_t>& chosen, const std::vector<std::int32_t>& queries,
              const Held& q, int all, float softcap, bool partial, Whole whole) {
    const int heads = shape_.kv_heads * shape_.group;
    const std::size_t count = static_cast<std::size_t>(heads) * static_cast<std::size_t>(all) *
                              static_cast<std::size_t>(shape_.dim),
                      state = static_cast<std::size_t>(heads * all);
    AttendArgs args;
    args.q = view(q, heads, all);
    args.softcap = softcap;
    const std::vector<float> untouched(count + 2 * state, 12345.0f);
    Held out(backend_, untouched.size() * sizeof(float)), want(backend_, untouched.size() * sizeof(float));
    out.put(untouched);
    want.put(untouched);
    const auto place = [&](const Held& x) {
      return MutableTensorView{x.as<void>(),
                               DType::f32,
                               {1, heads, all, shape_.dim},
                               {0, static_cast<std::int64_t>(all) * shape_.dim, shape_.dim, 1}};
    };
    const auto parts = [&](const Held& x) {
      return PartialState{x.as<float>(), x.as<float>() + count, x.as<float>() + count + state};
    };
    ASSERT_TRUE(
        ok(partial ? format->attend_partial(batch, args, parts(out), workspace->span()) : whole(args, place(out))));

    std::vector<SequenceView> views;
    std::vector<std::unique_ptr<Held>> held;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      const Sequence& s = sequences[chosen[i]];
      SequenceView v;
      v.input_row = queries[i];
      v.query_count = queries[i + 1] - queries[i];
      v.query_position = s.length - v.query_count;
      held.push_back(std::make_unique<Held>(backend_, kTable * sizeof(std::int32_t)));
      held.back()->put(s.pages);
      v.pages = held.back()->as<std::int32_t>();
      v.page_count = static_cast<std::int32_t>(s.sealed / kPageTokens);
      if (v.page_count > 0 && shape_.sinks > 0) {
        v.pages_hidden = shape_.sinks;
        held.push_back(std::make_unique<Held>(backend_, static_cast<std::size_t>(shape_.sinks * row()) * 4));
        gather(0, {s.sinks}, shape_.sinks, *held.back());
        v.exact[0] = rows_of(*held.back(), 0, shape_.sinks);
      }
      if (s.length > s.sealed) {
        held.push_back(std::make_unique<Held>(backend_, static_cast<std::size_t>((s.length - s.sealed) * row()) * 4));
        gather(s.sealed, s.blocks, s.length - s.sealed, *held.back());
        v.exact[1] = rows_of(*held.back(), s.sealed, s.length - s.sealed);
      }
      v.lambda_k = shape_.lambda ? batch.lambda_k + static_cast<std::int64_t>(i) * batch.lambda_k_stride : nullptr;
      v.lambda_v = shape_.lambda ? batch.lambda_v + static_cast<std::int64_t>(i) * batch.lambda_v_stride : nullptr;
      views.push_back(v);
    }
    AttendJob job;
    job.args = args;
    job.spec = &spec;
    job.pages = batch.page_memory;
    job.dtype = shape_.dtype;
    job.kv_heads = shape_.kv_heads;
    job.head_dim_k = job.head_dim_v = shape_.dim;
    job.sequences.views = views;
    job.sequences.most_queries = batch.most_queries;
    job.sequences.longest = batch.longest;  // so that both calls share out the work alike
    job.sequences.all = batch.all;
    job.window = shape_.window;
    if (partial) job.partial = parts(want);
    else job.out = place(want);
    ASSERT_TRUE(ok(backend_.attend(job)));
    expect_same(out, want, count + 2 * state);
  }

  // The same tokens summed in another order: by each of n terms a rounding of the largest value, some 5 of them here.
  void expect_same(const Held& out, const Held& want, std::size_t count) {
    const std::vector<std::uint8_t> a = out.read(), b = want.read();
    for (std::size_t i = 0; i < count; ++i) {
      float x = 0, y = 0;
      std::memcpy(&x, a.data() + i * 4, 4);
      std::memcpy(&y, b.data() + i * 4, 4);
      ASSERT_NEAR(x, y, 64 * 0x1p-23 * (5 + std::abs(y))) << "element " << i;
    }
  }

  // Bytes of pages are those of the backend's own sealing of the same rows, the sinks masked.
  void check_sealed(const PagedBatch& batch, int n, const Sequence& s, std::int64_t begin, std::int64_t end) {
    Held expected(backend_, format->page_bytes());
    for (std::int64_t p = begin / kPageTokens; p < end / kPageTokens; ++p) {
      Held rows(backend_, format->block_bytes());
      gather(p * kPageTokens, s.blocks, kPageTokens, rows);
      std::vector<std::uint8_t> skip(kPageTokens, 0);
      if (p == 0) std::fill_n(skip.begin(), shape_.sinks, std::uint8_t{1});
      Held flags(backend_, kPageTokens);
      flags.put(skip);
      const ExactRows r = rows_of(rows, 0, kPageTokens);
      SealJob job;
      job.k = r.k;
      job.v = r.v;
      job.dtype = shape_.dtype;
      job.k_head_stride = job.v_head_stride = r.k_head_stride;
      job.k_stride = job.v_stride = r.k_stride;
      job.skip = flags.as<std::uint8_t>();
      job.lambda_k = shape_.lambda ? batch.lambda_k + n * batch.lambda_k_stride : nullptr;
      job.lambda_v = shape_.lambda ? batch.lambda_v + n * batch.lambda_v_stride : nullptr;
      PageMemory memory = batch.page_memory;
      memory.data = expected.as<std::uint8_t>();
      ASSERT_TRUE(ok(backend_.seal(spec, memory, shape_.kv_heads, {&job, 1}, false)));
      const std::vector<std::uint8_t> want = expected.read(), all = pages->read();
      const std::size_t at = static_cast<std::size_t>(s.pages[static_cast<std::size_t>(p)]) * format->page_bytes();
      ASSERT_TRUE(std::equal(want.begin(), want.end(), all.begin() + static_cast<std::ptrdiff_t>(at))) << "page " << p;
    }
  }

  const ServerShape shape_;
  cases::Random random_;
  Backend& backend_;
  std::vector<std::int32_t> free_pages_, free_blocks_;
};

// A random run of a server: sequences come and go, prompts beside steps of one token and of several.
inline void run_server(const ServerShape& shape, std::uint64_t seed, int steps) {
  SCOPED_TRACE(shape.backend + ", " + std::to_string(shape.bits_k) + " and " + std::to_string(shape.bits_v) +
               " bits, " + std::to_string(shape.refined) + " refined, seed " + std::to_string(seed));
  PagedServer server(shape, seed);
  cases::Random random(seed + 1);
  for (int i = 0; i < steps && !::testing::Test::HasFatalFailure(); ++i) {
    if (server.sequences.empty() || (server.sequences.size() < 4 && random.below(4) == 0)) server.add();
    if (server.sequences.size() > 1 && random.below(12) == 0)
      server.remove(static_cast<std::size_t>(random.below(static_cast<int>(server.sequences.size()))));
    std::vector<std::size_t> chosen;
    std::vector<int> counts;
    const auto size = static_cast<int>(server.sequences.size());
    const int first = random.below(size), last = first + random.below(size - first);
    for (int n = first; n <= last; ++n) {
      PagedServer::Sequence& s = server.sequences[static_cast<std::size_t>(n)];
      if (s.length > 900) continue;
      if (!chosen.empty() && chosen.back() + 1 != static_cast<std::size_t>(n)) break;
      chosen.push_back(static_cast<std::size_t>(n));
      const int kind = random.below(4);
      counts.push_back(kind == 0 ? random.below(80) : kind == 1 ? random.below(6) : 1);
    }
    const auto calls = i % 7 == 0   ? PagedServer::Calls::partial
                       : i % 3 == 0 ? PagedServer::Calls::separate
                                    : PagedServer::Calls::together;
    server.step(chosen, counts, i % 5 == 0 ? 20.0f : 0.0f, calls);
  }
}

}  // namespace kv4::tests
