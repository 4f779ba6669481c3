// A toy server: requests arrive and finish, share one memory pool, and are batched together in each step, prefill
// beside decode. The model is one attention layer over random embeddings; everything else is what a real server on
// kv4/paged.h does.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "kv4/paged.h"

using Ids = std::vector<std::int32_t>;
using Text = std::vector<int>;  // a prompt, then what was generated, up to a word 0

constexpr int kHeads = 4, kKvHeads = 2, kDim = 64, kWords = kHeads * kDim, kExact = 64, kPage = kv4::kPageTokens;
constexpr int kSlots = 5, kTable = 16, kPool = kSlots * kTable;  // concurrent requests; pages per request, and in all
constexpr int kBlock = 2 * kKvHeads * kPage * kDim;              // floats of a block of exact rows: keys, then values

void check(const kv4::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str()), std::exit(1);
}

struct Server {
  std::unique_ptr<kv4::PageFormat> format;
  std::vector<std::byte> workspace;
  std::vector<float> embeddings = std::vector<float>(kWords * kDim), exact = std::vector<float>(kPool * kBlock);
  std::vector<std::uint8_t> memory;
  Ids free_pages, free_blocks;
  // Per slot: its request, tokens cached, tokens sealed, tokens sealed after this step, token ids by position.
  std::vector<Text> texts = std::vector<Text>(kSlots);
  Ids queries = Ids(kSlots + 1), lengths = Ids(kSlots), sealed = lengths, due = lengths, sinks = lengths;
  Ids pages = Ids(kPool, -1), blocks = pages;

  Server() {
    std::mt19937 random(1);
    for (float& x : embeddings) x = std::normal_distribution<float>()(random);
    kv4::CacheConfig config;  // one layer; a model has a format for all layers alike and memory for each
    config.kv_heads = kKvHeads;
    config.head_dim_k = config.head_dim_v = kDim;
    check(kv4::PageFormat::create(config, &format));
    std::size_t bytes = 0;
    check(format->workspace_bytes(
        {.sequences = kSlots, .q_heads = kHeads, .most_pages = kTable, .most_queries = kTable * kPage}, &bytes));
    workspace.resize(bytes);
    memory.resize(kPool * format->page_bytes() + 64);
    for (int i = 0; i < kPool; ++i) free_pages.push_back(i), free_blocks.push_back(i);
  }
  static void take(Ids& free, std::int32_t* id) { *id = free.back(), free.pop_back(); }

  // One step of all slots: store new tokens, attend, seal old tokens, pick each next token.
  void step() {
    std::vector<float> rows;  // [row, dim]: a model's keys, values and queries would be projections of these
    for (int s = 0; s < kSlots; ++s) {
      for (const int end = static_cast<int>(texts[s].size()); lengths[s] < end; ++lengths[s]) {
        if (lengths[s] % kPage == 0) take(free_blocks, &blocks[s * kTable + lengths[s] / kPage]);
        const float* word = &embeddings[texts[s][lengths[s]] * kDim];
        rows.insert(rows.end(), word, word + kDim);
      }
      queries[s + 1] = static_cast<int>(rows.size()) / kDim;
      due[s] = std::max(sealed[s], (lengths[s] - kExact) / kPage * kPage);
      for (int p = sealed[s] / kPage; p < due[s] / kPage; ++p) take(free_pages, &pages[s * kTable + p]);
      sinks[s] = blocks[s * kTable];  // the first tokens stay exact beside page 0
    }
    const std::int64_t page_bytes = format->page_bytes(), head_bytes = format->head_bytes(), count = queries.back();
    kv4::PagedBatch batch;
    batch.size = kSlots, batch.page_count = batch.block_count = kPool, batch.sink_tokens = 4;
    batch.queries = queries.data(), batch.lengths = lengths.data(), batch.sealed = sealed.data(),
    batch.sinks = sinks.data();
    batch.pages = pages.data(), batch.blocks = blocks.data(), batch.pages_stride = batch.blocks_stride = kTable;
    batch.page_memory = {memory.data() + 64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64, nullptr, page_bytes,
                         head_bytes, 0};
    batch.row_memory = {exact.data(), &exact[kBlock / 2], kBlock, kBlock, kPage * kDim, kPage * kDim, kDim, kDim};
    const kv4::TensorView kv{rows.data(), kv4::DType::f32, {1, kKvHeads, count, kDim}, {0, 0, kDim, 1}};
    std::vector<float> out(count * kWords);
    kv4::AttendArgs args;
    args.q = {rows.data(), kv4::DType::f32, {1, kHeads, count, kDim}, {0, 0, kDim, 1}};
    check(format->store(batch, kv, kv, workspace));
    check(format->attend(batch, args, {out.data(), kv4::DType::f32, {1, kHeads, count, kDim}, {0, kDim, kWords, 1}},
                         workspace));
    check(format->seal(batch, {sealed.data(), due.data(), kTable}, workspace));
    for (int s = 0; s < kSlots; ++s) {
      for (int p = std::max(1, sealed[s] / kPage); p < due[s] / kPage; ++p)
        free_blocks.push_back(blocks[s * kTable + p]);
      sealed[s] = due[s];
      if (lengths[s] == 0) continue;
      const float* answer = &out[(queries[s + 1] - 1) * kWords];
      texts[s].push_back(static_cast<int>(std::max_element(answer, answer + kWords) - answer + 31 * texts[s].back()) %
                         kWords);
    }
  }

  // A finished request's memory goes to waiting ones.
  Text leave(int s) {
    for (int p = 0; p < sealed[s] / kPage; ++p) free_pages.push_back(pages[s * kTable + p]);
    for (int b = 0; b * kPage < lengths[s]; ++b)
      if (b == 0 || b >= sealed[s] / kPage) free_blocks.push_back(blocks[s * kTable + b]);
    lengths[s] = sealed[s] = 0;
    return std::exchange(texts[s], {});
  }
};

// Serves all requests, at most `together` concurrently.
std::vector<Text> serve(std::vector<Text> waiting, int together) {
  Server server;
  std::vector<Text> done;
  for (const std::size_t all = waiting.size(); done.size() < all; server.step()) {
    for (int s = 0; s < together; ++s) {
      Text& text = server.texts[s];
      if (!text.empty() && (text.back() == 0 || text.size() == kTable * kPage)) done.push_back(server.leave(s));
      if (text.empty() && !waiting.empty()) text = waiting.back(), waiting.pop_back();
    }
  }
  if (server.free_pages.size() != kPool || server.free_blocks.size() != kPool)
    std::fprintf(stderr, "memory was lost\n"), std::exit(1);
  std::sort(done.begin(), done.end());
  return done;
}

int main() {
  std::mt19937 random(7);
  std::vector<Text> prompts(12);
  for (Text& prompt : prompts)
    for (unsigned n = 1 + random() % 300; n > 0; --n) prompt.push_back(static_cast<int>(1 + random() % (kWords - 1)));
  const bool same = serve(prompts, kSlots) == serve(prompts, 1);
  std::printf("12 requests, five at a time: %s\n",
              same ? "the texts of one at a time" : "OTHER texts than one at a time");
  return same ? 0 : 1;
}
