// Decoding over a host's memory: sequences of different lengths in one call, against each in a call of its own.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cases.h"
#include "format/convert.h"
#include "kv4/paged.h"

namespace kv4 {
namespace {

// A batch of decode steps: pages and blocks of random bytes, scales that are numbers.
struct Batch {
  std::unique_ptr<PageFormat> format;
  std::vector<std::int32_t> queries, lengths, sealed, pages, blocks;
  std::vector<std::uint8_t> memory;
  std::vector<std::uint16_t> rows, q, out;
  std::vector<std::byte> workspace;
  PagedBatch all;
  int heads, dim;

  Batch(const cases::Geometry& g, const std::vector<int>& tokens) : heads(g.q_heads), dim(g.head_dim) {
    CacheConfig config;
    config.dtype = DType::f16;
    config.kv_heads = g.kv_heads;
    config.head_dim_k = config.head_dim_v = dim;
    if (!PageFormat::create(config, &format).ok()) return;
    const int size = static_cast<int>(tokens.size());
    int table = 0, page_count = 0;
    for (int n : tokens) table = std::max(table, n / kPageTokens + 1);
    queries.push_back(0);
    for (int n : tokens) {
      const int packed = n > 128 ? (n - 64) / kPageTokens : 0;
      queries.push_back(queries.back() + 1);
      lengths.push_back(n);
      sealed.push_back(packed * kPageTokens);
      for (int p = 0; p < table; ++p) {
        pages.push_back(p < packed ? page_count++ : 0);
        blocks.push_back(static_cast<std::int32_t>(lengths.size() - 1) * 3 + p % 3);
      }
    }
    memory.assign(static_cast<std::size_t>(page_count) * format->page_bytes() + 64, 0x31);  // scales of .16
    rows.assign(static_cast<std::size_t>(3 * size) * format->block_bytes() / 2, 0x2e66);
    q.assign(static_cast<std::size_t>(size * heads * dim), 0x3800);
    out.resize(q.size());
    all.size = size;
    all.queries = queries.data(), all.lengths = lengths.data(), all.sealed = sealed.data();
    all.pages = pages.data(), all.blocks = blocks.data(), all.pages_stride = all.blocks_stride = table;
    all.page_memory.data = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    all.page_memory.page_stride = static_cast<std::int64_t>(format->page_bytes());
    all.page_memory.head_stride = static_cast<std::int64_t>(format->head_bytes());
    const std::int64_t half = static_cast<std::int64_t>(format->block_bytes()) / 4;
    all.row_memory = {rows.data(),       rows.data() + half, 2 * half, 2 * half,
                      kPageTokens * dim, kPageTokens * dim,  dim,      dim};
    all.page_count = page_count, all.block_count = 3 * size;
    std::size_t bytes = 0;
    const std::int64_t sum = std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
    if (format
            ->workspace_bytes({.sequences = size, .q_heads = heads, .longest = table * kPageTokens, .all = sum}, &bytes)
            .ok())
      workspace.resize(bytes);
  }
  // Sequences [first, first + count).
  Status attend(int first, int count) {
    PagedBatch part = all;
    part.size = count;
    part.lengths += first, part.sealed += first;
    part.pages += first * part.pages_stride, part.blocks += first * part.blocks_stride;
    const std::int64_t n = count, row = heads * dim;
    AttendArgs args;
    args.q = {q.data() + first * row, DType::f16, {1, heads, n, dim}, {0, dim, row, 1}};
    return format->attend(part, args, {out.data() + first * row, DType::f16, {1, heads, n, dim}, {0, dim, row, 1}},
                          workspace);
  }
};

std::vector<int> lengths_of(const std::string& kind) {
  if (kind == "ragged") return {100, 300, 700, 1500, 3000, 6000, 11000, 16000};
  return std::vector<int>(32, 1000);
}

void decode(benchmark::State& state, const cases::Geometry& g, const std::string& kind, bool together) {
  Batch batch(g, lengths_of(kind));
  for (auto _ : state) {
    const int calls = together ? 1 : batch.all.size;
    for (int i = 0; i < calls; ++i) {
      const Status status = batch.attend(i, together ? batch.all.size : 1);
      if (!status.ok()) return state.SkipWithError(status.message().c_str());
    }
    benchmark::ClobberMemory();
  }
}

const bool registered = [] {
  for (const cases::Geometry& g : cases::kGeometries)
    for (const char* kind : {"ragged", "thirty_two"})
      for (const bool together : {true, false}) {
        const std::string name = std::string("paged/") + kind + "/" + g.name +
                                 (together ? "/one_call" : "/a_call_each");
        benchmark::RegisterBenchmark(name.c_str(), decode, g, kind, together)->UseRealTime();
      }
  return true;
}();

}  // namespace
}  // namespace kv4
