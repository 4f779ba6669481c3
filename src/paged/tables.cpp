#include "paged/tables.h"

#include <algorithm>
#include <string>
#include <utility>

#include "backend/batch.h"

namespace kv4 {
namespace {

std::string at(const char* array, int b) { return std::string(array) + "[" + std::to_string(b) + "]"; }

Status beyond(const std::string& what, const std::string& expected, std::int64_t got) {
  return error(StatusCode::out_of_range, what, expected, std::to_string(got));
}

// Entries [begin, end) of sequence b's row of a table.
Status check_ids(const char* name, const std::int32_t* table, std::int64_t stride, int b, std::int64_t begin,
                 std::int64_t end, std::int32_t count) {
  if (end > begin && end > stride)
    return beyond(at(name, b),
                  "at most " + std::to_string(stride) + " entries, its stride, for the tokens of the sequence", end);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int32_t id = table[b * stride + i];
    if (id < 0 || id >= count)
      return beyond(std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(i) + "]",
                    "an id from 0 to " + std::to_string(count - 1), id);
  }
  return {};
}

Status check_sequence(const PagedBatch& batch, int b, Use use, std::int64_t rows) {
  const std::int64_t begin = batch.queries[b], count = batch.queries[b + 1] - begin, length = batch.lengths[b],
                     sealed = batch.sealed[b];
  if (begin < 0 || count < 0 || begin + count > rows)
    return beyond(at("queries", b), "rows that follow one another, within " + std::to_string(rows),
                  batch.queries[b + 1]);
  if (length < count)
    return beyond(at("lengths", b), "at least its " + std::to_string(count) + " rows of this call", length);
  if (sealed < 0 || sealed > length || sealed % kPageTokens != 0)
    return beyond(at("sealed", b),
                  "a multiple of " + std::to_string(kPageTokens) + " from 0 to its length, " + std::to_string(length),
                  sealed);
  if (use == Use::store && sealed > length - count)
    return beyond(at("sealed", b), "at most " + std::to_string(length - count) + ", where its new rows begin", sealed);
  if (count == 0) return {};
  const SequenceView view = view_of(batch, b, true);
  const std::int64_t page = view.pages_position / kPageTokens, block = view.exact[1].position / kPageTokens;
  const std::int64_t first_row = use == Use::store ? (length - count) / kPageTokens : block;
  KV4_RETURN_IF_ERROR(check_ids("blocks", batch.blocks, batch.blocks_stride, b, first_row,
                                (length + kPageTokens - 1) / kPageTokens, batch.block_count));
  if (use == Use::store) return {};
  KV4_RETURN_IF_ERROR(
      check_ids("pages", batch.pages, batch.pages_stride, b, page, page + view.page_count, batch.page_count));
  return view.exact[0].count > 0 ? check_ids("sinks", batch.sinks, 1, b, 0, 1, batch.block_count) : Status();
}

}  // namespace

Status check_batch(const PagedBatch& batch) {
  if (batch.size < 0) return invalid_argument("batch.size", "0 or more", std::to_string(batch.size));
  // Head slices are read by whole cache lines.
  const std::pair<const char*, std::int64_t> aligned[] = {
      {"data", static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(batch.page_memory.data))},
      {"page_stride", batch.page_memory.page_stride},
      {"head_stride", batch.page_memory.head_stride}};
  for (const auto& [name, value] : aligned)
    if (value % 64 != 0)
      return invalid_argument(std::string("batch.page_memory.") + name, "a multiple of 64", std::to_string(value));
  if (batch.size == 0) return {};
  const struct {
    const char* name;
    const void* p;
  } needed[] = {{"queries", batch.queries},
                {"lengths", batch.lengths},
                {"sealed", batch.sealed},
                {"pages", batch.pages},
                {"blocks", batch.blocks},
                {"row_memory.k", batch.row_memory.k},
                {"row_memory.v", batch.row_memory.v}};
  for (const auto& [name, p] : needed)
    if (p == nullptr) return invalid_argument(std::string("batch.") + name, "a pointer", "null");
  if (batch.page_memory.data == nullptr && batch.page_memory.chunks == nullptr && batch.page_count > 0)
    return invalid_argument("batch.page_memory", "data or chunks", "null");
  if (batch.page_memory.chunk_shift < 0 || batch.page_memory.chunk_shift > 30)
    return invalid_argument("batch.page_memory.chunk_shift", "0 to 30", std::to_string(batch.page_memory.chunk_shift));
  if (batch.sink_tokens < 0 || batch.sink_tokens > kPageTokens)
    return invalid_argument("batch.sink_tokens", "0 to " + std::to_string(kPageTokens),
                            std::to_string(batch.sink_tokens));
  if (batch.window < 0) return invalid_argument("batch.window", "0 (all) or more", std::to_string(batch.window));
  const struct {
    const char* name;
    std::int64_t value;
  } counts[] = {{"pages_stride", batch.pages_stride},
                {"blocks_stride", batch.blocks_stride},
                {"page_count", batch.page_count},
                {"block_count", batch.block_count},
                {"most_queries", batch.most_queries},
                {"longest", batch.longest},
                {"all", batch.all}};
  for (const auto& [name, value] : counts)
    if (value < 0) return invalid_argument(std::string("batch.") + name, "0 or more", std::to_string(value));
  return {};
}

Status check_tables(PagedBatch* batch, Use use, std::int64_t rows) {
  std::int64_t most = 0, longest = 0, all = 0;
  for (int b = 0; b < batch->size; ++b) {
    KV4_RETURN_IF_ERROR(check_sequence(*batch, b, use, rows));
    most = std::max<std::int64_t>(most, batch->queries[b + 1] - batch->queries[b]);
    longest = std::max<std::int64_t>(longest, batch->lengths[b]);
    all += batch->lengths[b];
  }
  batch->most_queries = most;
  batch->longest = longest;
  batch->all = all;
  return {};
}

Status check_range(const PagedBatch& batch, const PageRange& range, bool readable) {
  if (range.begin == nullptr || range.end == nullptr)
    return invalid_argument(range.begin == nullptr ? "range.begin" : "range.end", "a pointer", "null");
  if (range.most < 0) return invalid_argument("range.most", "0 or more", std::to_string(range.most));
  if (!readable) return {};
  for (int b = 0; b < batch.size; ++b) {
    const std::int64_t begin = range.begin[b], end = range.end[b];
    if (begin < 0 || begin % kPageTokens != 0)
      return beyond(at("range.begin", b), "a multiple of " + std::to_string(kPageTokens), begin);
    if (end < begin || end % kPageTokens != 0)
      return beyond(at("range.end", b),
                    "a multiple of " + std::to_string(kPageTokens) + ", at least " + std::to_string(begin), end);
    const std::int64_t first = begin / kPageTokens, last = end / kPageTokens;
    if (last - first > range.most)
      return beyond(at("range.end", b), "at most " + std::to_string(range.most) + " pages of a sequence", last - first);
    KV4_RETURN_IF_ERROR(check_ids("pages", batch.pages, batch.pages_stride, b, first, last, batch.page_count));
    KV4_RETURN_IF_ERROR(check_ids("blocks", batch.blocks, batch.blocks_stride, b, first, last, batch.block_count));
  }
  return {};
}

Status check_unread(const PagedBatch& batch, const PageRange& range) {
  for (int b = 0; b < batch.size; ++b)
    if (range.end[b] > range.begin[b] && range.begin[b] < batch.sealed[b])
      return beyond(at("range.begin", b), "at least sealed[b], " + std::to_string(batch.sealed[b]), range.begin[b]);
  return {};
}

}  // namespace kv4
