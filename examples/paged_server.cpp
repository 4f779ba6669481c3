// A toy server: requests come and go, share one pool of memory, and are decoded in one batch a step, prompts beside single tokens. Its
// model is one layer of attention over random embeddings; all else is what a server on kv4/paged.h does.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "kv4/paged.h"

namespace {

constexpr int kHeads = 4, kKvHeads = 2, kDim = 64, kWords = 500, kSinks = 4, kExact = 64, kTable = 16, kMost = 8;
constexpr int kPage = kv4::kPageTokens, kBlock = 2 * kKvHeads * kPage * kDim;  // floats of a block: keys, then values

struct Request {
  std::vector<int> tokens;  // prompt, then what was generated
  std::size_t wanted = 0, done = 0, sealed = 0;  // tokens in the cache; of these in pages
  std::vector<std::int32_t> pages = std::vector<std::int32_t>(kTable, -1), blocks = pages;
  std::int32_t sinks = -1;
};

void check(const kv4::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str()), std::exit(1);
}
std::int32_t take(std::vector<std::int32_t>& free) {
  const std::int32_t id = free.back();
  free.pop_back();
  return id;
}

struct Server {
  std::unique_ptr<kv4::PageFormat> format;
  std::vector<std::byte> workspace;
  std::vector<float> embeddings = std::vector<float>(static_cast<std::size_t>(kWords) * kDim), blocks;
  std::unique_ptr<std::uint8_t[]> memory;
  std::uint8_t* pages = nullptr;
  std::vector<std::int32_t> free_pages, free_blocks;
  std::vector<Request> running;

  Server() {
    std::mt19937 random(1);
    for (float& x : embeddings) x = std::normal_distribution<float>()(random);
    kv4::CacheConfig config;  // one layer; a model has a format for all layers alike and memory for each
    config.kv_heads = kKvHeads;
    config.head_dim_k = config.head_dim_v = kDim;
    check(kv4::PageFormat::create(config, &format));
    std::size_t bytes = 0;
    check(format->workspace_bytes({.sequences = kMost, .q_heads = kHeads, .most_pages = kTable, .most_queries = kTable * kPage}, &bytes));
    workspace.resize(bytes);
    constexpr int kPages = kMost * kTable, kBlocks = kMost * (kTable + 1);
    memory = std::make_unique<std::uint8_t[]>(kPages * format->page_bytes() + 64);
    pages = memory.get() + (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64) % 64;
    blocks.resize(static_cast<std::size_t>(kBlocks) * kBlock);
    for (int i = 0; i < kPages; ++i) free_pages.push_back(i);
    for (int i = 0; i < kBlocks; ++i) free_blocks.push_back(i);
  }

  // One step of all that run: their new tokens stored, their queries answered, the next token of each chosen, old tokens sealed.
  void step() {
    std::vector<std::int32_t> queries{0}, lengths, sealed, due, sinks, page_table, block_table;
    std::vector<float> rows;  // [row, dim]: a model's keys, values and queries would be projections of these
    for (Request& r : running) {
      const std::size_t n = r.tokens.size();
      for (std::size_t b = (r.done + kPage - 1) / kPage; b * kPage < n; ++b) r.blocks[b] = take(free_blocks);
      for (std::size_t t = r.done; t < n; ++t) rows.insert(rows.end(), &embeddings[r.tokens[t] * kDim], &embeddings[r.tokens[t] * kDim] + kDim);
      queries.push_back(static_cast<std::int32_t>(rows.size() / kDim));
      lengths.push_back(static_cast<std::int32_t>(n));
      sealed.push_back(static_cast<std::int32_t>(r.sealed));
      due.push_back(static_cast<std::int32_t>(std::max(r.sealed, n > kExact ? (n - kExact) / kPage * kPage : 0)));
      for (std::size_t p = r.sealed / kPage; p < static_cast<std::size_t>(due.back()) / kPage; ++p) r.pages[p] = take(free_pages);
      sinks.push_back(r.sinks);
      page_table.insert(page_table.end(), r.pages.begin(), r.pages.end());
      block_table.insert(block_table.end(), r.blocks.begin(), r.blocks.end());
    }
    kv4::PagedBatch batch;
    batch.size = static_cast<int>(running.size());
    batch.queries = queries.data(), batch.lengths = lengths.data(), batch.sealed = sealed.data(), batch.sinks = sinks.data();
    batch.pages = page_table.data(), batch.blocks = block_table.data(), batch.pages_stride = batch.blocks_stride = kTable;
    batch.sink_tokens = kSinks;
    batch.page_memory = {pages, nullptr, static_cast<std::int64_t>(format->page_bytes()), static_cast<std::int64_t>(format->head_bytes()), 0};
    batch.row_memory = {blocks.data(), blocks.data() + kBlock / 2, kBlock, kBlock, kPage * kDim, kPage * kDim, kDim, kDim};
    batch.page_count = kMost * kTable, batch.block_count = kMost * (kTable + 1);
    const std::int64_t count = queries.back();
    const kv4::TensorView kv{rows.data(), kv4::DType::f32, {1, kKvHeads, count, kDim}, {0, 0, kDim, 1}};
    std::vector<float> out(static_cast<std::size_t>(count) * kHeads * kDim);
    kv4::AttendArgs args;
    args.q = {rows.data(), kv4::DType::f32, {1, kHeads, count, kDim}, {0, 0, kDim, 1}};
    check(format->store(batch, kv, kv, workspace));
    check(format->attend(batch, args, {out.data(), kv4::DType::f32, {1, kHeads, count, kDim}, {0, kDim, kHeads * kDim, 1}}, workspace));
    check(format->seal(batch, {sealed.data(), due.data(), kTable}, workspace));
    for (std::size_t i = 0; i < running.size(); ++i) {
      Request& r = running[i];
      r.done = r.tokens.size();
      for (std::size_t p = r.sealed / kPage; p < static_cast<std::size_t>(due[i]) / kPage; ++p)
        p == 0 ? void(r.sinks = r.blocks[p]) : free_blocks.push_back(r.blocks[p]);
      r.sealed = static_cast<std::size_t>(due[i]);
      r.tokens.push_back(next(&out[static_cast<std::size_t>(queries[i + 1] - 1) * kHeads * kDim], r.tokens.back()));
    }
  }
  // The word whose embedding is most like the answer, but not the last word.
  int next(const float* answer, int last) const {
    int best = 0;
    float most = -INFINITY;
    for (int w = 0; w < kWords; ++w) {
      float dot = 0;
      for (int c = 0; c < kDim; ++c) dot += answer[c] * embeddings[w * kDim + c];
      if (dot > most && w != last) most = dot, best = w;
    }
    return best;
  }
  void leave(std::size_t i) {
    Request& r = running[i];
    free_pages.insert(free_pages.end(), r.pages.begin(), r.pages.begin() + static_cast<std::ptrdiff_t>(r.sealed / kPage));
    for (std::size_t b = r.sealed / kPage; b * kPage < r.done; ++b) free_blocks.push_back(r.blocks[b]);
    if (r.sinks >= 0) free_blocks.push_back(r.sinks);
    running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
  }
};

// Serves all requests, at most `together` at once.
std::vector<std::vector<int>> serve(std::deque<Request> waiting, std::size_t together) {
  Server server;
  const std::size_t pages = server.free_pages.size(), blocks = server.free_blocks.size();
  std::vector<std::vector<int>> texts;
  while (!waiting.empty() || !server.running.empty()) {
    for (; !waiting.empty() && server.running.size() < together; waiting.pop_front()) server.running.push_back(waiting.front());
    server.step();
    for (std::size_t i = server.running.size(); i-- > 0;) {
      if (server.running[i].tokens.size() < server.running[i].wanted) continue;
      texts.push_back(server.running[i].tokens);
      server.leave(i);
    }
  }
  if (server.free_pages.size() != pages || server.free_blocks.size() != blocks) std::fprintf(stderr, "memory was lost\n"), std::exit(1);
  std::sort(texts.begin(), texts.end());
  return texts;
}

}  // namespace

int main() {
  std::mt19937 random(7);
  std::deque<Request> requests;
  for (int i = 0; i < 12; ++i) {
    Request r;
    for (unsigned n = 1 + random() % 300; n > 0; --n) r.tokens.push_back(static_cast<int>(random() % kWords));
    r.wanted = r.tokens.size() + 20 + random() % 200;
    requests.push_back(r);
  }
  const bool same = serve(requests, 5) == serve(requests, 1);
  std::printf("12 requests, five at a time: %s\n", same ? "the texts of one at a time" : "OTHER texts than one at a time");
  return same ? 0 : 1;
}
