// Accessors: dequantised tokens, lambda, slices, bytes.
#include <algorithm>
#include <set>
#include <string>

#include "attention/arguments.h"
#include "attention/output.h"
#include "cache/state.h"

namespace kv4 {
namespace {

struct Dense {
  const CacheState& c;
  bool keys;
  std::int64_t first, count;
  const MutableTensorView& out;

  // Rows from position `at` on that are exact, or zeros where there are none.
  Status put(std::size_t b, const RowBuffer* from, std::int64_t at, std::int64_t there) const {
    const std::int64_t lo = std::max(at, first), hi = std::min(at + there, first + count);
    if (lo >= hi) return {};
    const Setup& setup = *c.setup;
    ConvertJob job;
    if (from != nullptr) {
      const ExactRows rows = from->view(lo - at, hi - lo, lo);
      job.from = keys ? rows.k : rows.v;
      job.from_head_stride = keys ? rows.k_head_stride : rows.v_head_stride;
      job.from_stride = keys ? rows.k_stride : rows.v_stride;
    }
    job.from_dtype = setup.config.dtype;
    job.to = out.at(static_cast<std::int64_t>(b), 0, lo - first);
    job.to_dtype = out.dtype;
    job.to_head_stride = out.stride[1];
    job.to_stride = out.stride[2];
    job.heads = setup.heads();
    job.dim = keys ? setup.config.head_dim_k : setup.config.head_dim_v;
    job.rows = hi - lo;
    return c.backend().convert(job);
  }

  Status put_pages(std::size_t b) const {
    const Setup& setup = *c.setup;
    const Sequence& s = c.sequences[b];
    const ledger::Extent& x = s.ledger.extent();
    std::vector<DequantiseJob> jobs;
    for (std::int64_t i = x.first_page; i < x.page_end(); ++i) {
      const std::int64_t at = x.page_position(setup.policy, i),
                         tokens = i + 1 == x.page_end() ? x.last_page_tokens : kPageTokens;
      const std::int64_t lo = std::max(at, first), hi = std::min(at + tokens, first + count);
      if (lo >= hi) continue;
      DequantiseJob& job = jobs.emplace_back();
      job.page = s.ledger.pages()[static_cast<std::size_t>(i - x.first_page)];
      job.lambda_k = setup.lambda_k(s.body.lambda);
      job.lambda_v = setup.lambda_v();
      job.first = static_cast<std::int16_t>(lo - at);
      job.count = hi - lo;
      job.dtype = out.dtype;
      (keys ? job.k : job.v) = out.at(static_cast<std::int64_t>(b), 0, lo - first);
      job.k_head_stride = job.v_head_stride = out.stride[1];
      job.k_stride = job.v_stride = out.stride[2];
    }
    return jobs.empty() ? Status() : c.backend().dequantise(setup.spec, c.pool->memory(), setup.heads(), jobs, false);
  }
};

Status expect_room(const char* name, std::size_t need, std::size_t have, const char* unit) {
  return have == need ? Status() : invalid_argument(name, std::to_string(need) + unit, std::to_string(have));
}

// The head slice that a tool asks for by number.
Status find_slice(const CacheState& c, int row, int index, int head, const std::uint8_t** out) {
  const auto in_range = [](const char* name, int value, std::int64_t end) {
    return value >= 0 && value < end
               ? Status()
               : error(StatusCode::out_of_range, name, "0 to " + std::to_string(end - 1), std::to_string(value));
  };
  KV4_RETURN_IF_ERROR(in_range("row", row, c.batch()));
  const std::span<const PageId> pages = c.sequences[static_cast<std::size_t>(row)].ledger.pages();
  KV4_RETURN_IF_ERROR(in_range("index", index, static_cast<std::int64_t>(pages.size())));
  KV4_RETURN_IF_ERROR(in_range("head", head, c.setup->heads()));
  *out = c.pool->page(pages[static_cast<std::size_t>(index)]) +
         static_cast<std::size_t>(head) * c.setup->spec.layout.head_bytes;
  return {};
}

}  // namespace

Status dense(const CacheState& c, bool keys, std::int64_t first, std::int64_t count, const MutableTensorView& out) {
  const Setup& setup = *c.setup;
  const std::int64_t length = c.shortest(), dim = keys ? setup.config.head_dim_k : setup.config.head_dim_v;
  if (first < 0 || count < 0 || first > length || count > length - first)
    return error(StatusCode::out_of_range, "first, count", "positions within 0 to " + std::to_string(length),
                 std::to_string(first) + ", " + std::to_string(count));
  for (const Sequence& s : c.sequences)
    if (const std::int64_t evicted = s.ledger.extent().evicted; count > 0 && first < evicted)
      return error(StatusCode::out_of_range, "first",
                   "at least " + std::to_string(evicted) + " (older tokens left the sliding window)",
                   std::to_string(first));
  const std::array<std::int64_t, 4> shape{c.batch(), setup.heads(), count, dim};
  if (out.shape != shape) return invalid_argument("out", "shape " + shape_text(shape), shape_text(out.shape));
  if (out.stride[3] != 1 && dim > 1) return invalid_argument("out", "channel stride 1", std::to_string(out.stride[3]));
  KV4_RETURN_IF_ERROR(check_dtype("out", out.dtype));
  KV4_RETURN_IF_ERROR(check_places(out, nullptr));
  const Dense range{c, keys, first, count, out};
  for (std::size_t b = 0; b < c.sequences.size(); ++b) {
    const Sequence& s = c.sequences[b];
    const ledger::Extent& x = s.ledger.extent();
    // Dropped padding is read as 0.
    KV4_RETURN_IF_ERROR(range.put(b, nullptr, 0, x.anchored ? x.start : x.window_position));
    KV4_RETURN_IF_ERROR(range.put(b, &s.body.sinks, x.start, x.sinks));
    KV4_RETURN_IF_ERROR(range.put_pages(b));
    // Rows still exact win over pages sealed during the last call.
    KV4_RETURN_IF_ERROR(range.put(b, &s.body.window, x.window_position, x.window_rows()));
  }
  return {};
}

Status lambda(const CacheState& c, int row, std::vector<float>* out) {
  out->clear();
  const float* const values = c.setup->lambda_k(c.sequences[static_cast<std::size_t>(row)].body.lambda);
  if (values == nullptr) return {};
  out->resize(c.setup->channels());
  return c.backend().copy(out->data(), values, out->size() * sizeof(float));
}

Status page_codes(const CacheState& c, int row, int index, int head, std::span<std::uint8_t> k,
                  std::span<std::uint8_t> v) {
  const std::uint8_t* slice = nullptr;
  KV4_RETURN_IF_ERROR(find_slice(c, row, index, head, &slice));
  const auto bytes = [](const SideSpec& side) {
    return static_cast<std::size_t>(kPageTokens / 8 * side.levels.bits) * static_cast<std::size_t>(side.dim);
  };
  KV4_RETURN_IF_ERROR(expect_room("k", bytes(c.setup->spec.key), k.size(), " bytes"));
  KV4_RETURN_IF_ERROR(expect_room("v", bytes(c.setup->spec.value), v.size(), " bytes"));
  return c.backend().codes_to_canonical(c.setup->spec, slice, k.data(), v.data());
}

Status page_scales(const CacheState& c, int row, int index, int head, std::span<std::uint16_t> k,
                   std::span<std::uint16_t> v) {
  const std::uint8_t* slice = nullptr;
  KV4_RETURN_IF_ERROR(find_slice(c, row, index, head, &slice));
  const PageSpec& spec = c.setup->spec;
  const auto count = [](int groups) { return static_cast<std::size_t>(groups) * kPageTokens; };
  KV4_RETURN_IF_ERROR(expect_room("k", count(spec.key.groups), k.size(), " scales"));
  KV4_RETURN_IF_ERROR(expect_room("v", count(spec.value.groups), v.size(), " scales"));
  KV4_RETURN_IF_ERROR(c.backend().copy(k.data(), slice + spec.layout.k_scales, k.size_bytes()));
  return c.backend().copy(v.data(), slice + spec.layout.v_scales, v.size_bytes());
}

Status page_second_rows(const CacheState& c, int row, int index, int head, SecondRows* out) {
  const std::uint8_t* slice = nullptr;
  KV4_RETURN_IF_ERROR(find_slice(c, row, index, head, &slice));
  *out = SecondRows();
  const PageSpec& spec = c.setup->spec;
  const kv4_second_layout& at = spec.second;
  if (at.rows == 0) return {};
  const auto row_bytes = static_cast<std::size_t>(spec.key.dim) / 2;
  std::vector<std::uint8_t> places(at.rows);
  out->codes.resize(at.rows * row_bytes);
  out->scales.resize(at.rows * static_cast<std::size_t>(spec.key.groups));
  for (std::uint32_t i = 0; i < at.rows; ++i)
    KV4_RETURN_IF_ERROR(
        c.backend().copy(out->codes.data() + i * row_bytes, slice + at.codes + i * at.row_bytes, row_bytes));
  KV4_RETURN_IF_ERROR(c.backend().copy(out->scales.data(), slice + at.scales, 2 * out->scales.size()));
  KV4_RETURN_IF_ERROR(c.backend().copy(places.data(), slice + at.places, places.size()));
  out->places.assign(places.begin(), places.end());
  return {};
}

std::size_t nbytes(const CacheState& c) {
  const CacheConfig& config = c.setup->config;
  std::size_t sum = sizeof(Cache) + sizeof(CacheState) + sizeof(Setup);
  if (c.pool) sum += sizeof(PagePool) + c.pool->bytes();
  std::set<const void*> counted;  // forks share rows, tables and lambda: each block counts once
  const auto count_block = [&](const Block* block) {
    if (block != nullptr && counted.insert(block).second) sum += block->bytes() + sizeof(Block);
  };
  for (const Sequence& s : c.sequences) {
    const Body& body = s.body;
    for (const RowBuffer* rows : {&body.sinks, &body.window})
      if (rows->identity() != nullptr && counted.insert(rows->identity()).second) sum += rows->bytes();
    count_block(body.lambda.get());
    count_block(body.table.block());
    for (const std::shared_ptr<Block>& row : body.energy.rows) count_block(row.get());
    for (const PolledNote& polled : s.notes)
      sum += sizeof(PolledNote) + (counted.insert(polled.note.get()).second ? sizeof(LateNote) : 0);
    sum += s.ledger.bytes() + body.energy.rows.capacity() * sizeof(body.energy.rows[0]);
  }
  const auto held = [](const auto& x) { return x.capacity() * sizeof(x[0]); };
  sum += held(c.sequences) + held(c.parts) + held(c.views) + held(c.found) + held(c.non_finite) +
         held(config.lambda_k) + held(config.lambda_v) + held(config.matrix_k) + held(config.matrix_v);
  count_block(c.setup->given_k.get());
  count_block(c.setup->given_v.get());
  if (c.tables) sum += c.tables->bytes();
  for (const SharedMemory& memory : shared(c)) sum += memory.bytes;
  return sum;
}

std::vector<SharedMemory> shared(const CacheState& c) {
  std::vector<SharedMemory> all;
  const auto add = [&all](const void* identity, std::size_t bytes, bool on_device) {
    for (const SharedMemory& memory : all)
      if (memory.identity == identity) return;
    all.push_back({identity, bytes, on_device});
  };
  for (const SideSpec* side : {&c.setup->spec.key, &c.setup->spec.value}) {
    if (side->rotation == nullptr) continue;  // of a recipe that never seals
    add(side->rotation.get(), side->rotation->bytes(), false);
    if (const RotationTable* table = c.backend().table_of(*side->rotation); table != nullptr)
      add(table, table->bytes(), true);
  }
  return all;
}

}  // namespace kv4
