#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "settings.h"

namespace kv4::llama {
namespace {

constexpr std::int32_t kZeros[] = {0, 0};
constexpr std::int32_t kBegin[] = {0};
constexpr std::int32_t kEnd[] = {kPageTokens};

std::string shape_of(const Geometry& g) {
  return std::to_string(g.kv_heads) + " KV heads of " + std::to_string(g.head_dim_k) + " and " +
         std::to_string(g.head_dim_v);
}

}  // namespace

Layer::Layer(Cells& k, Cells& v, const Geometry& geometry) : k_(k), v_(v), geometry_(geometry) {}

Status Layer::create(Cells& k, Cells& v, const Geometry& g, std::unique_ptr<Layer>* out) {
  std::unique_ptr<Layer> layer(new Layer(k, v, g));
  if (&k == &v)
    return error(StatusCode::unsupported, "cache", "values of their own", "values that are a part of the keys");
  if (k.type != v.type || !dtype_of(k.type, &layer->dtype_))
    return error(StatusCode::unsupported, "cache type", "f16 or bf16 for keys and values alike",
                 std::string(ggml_type_name(k.type)) + " and " + ggml_type_name(v.type));
  if (k.cells != v.cells || k.streams != v.streams || k.cells % kPageTokens != 0)
    return error(StatusCode::unsupported, "cells",
                 "keys and values alike, a multiple of " + std::to_string(kPageTokens),
                 std::to_string(k.cells) + " and " + std::to_string(v.cells));
  if (k.channels != g.kv_heads * g.head_dim_k || v.channels != g.kv_heads * g.head_dim_v)
    return error(StatusCode::unsupported, "heads", "rows of " + shape_of(g),
                 std::to_string(k.channels) + " and " + std::to_string(v.channels) + " channels");
  CacheConfig config;
  config.recipe = settings().recipe;
  config.dtype = layer->dtype_;
  config.kv_heads = g.kv_heads;
  config.head_dim_k = g.head_dim_k;
  config.head_dim_v = g.head_dim_v;
  KV4_RETURN_IF_ERROR(PageFormat::create(config, &layer->format_));
  KV4_RETURN_IF_ERROR(layer->take_calibration());
  const std::size_t bytes = static_cast<std::size_t>(k.blocks()) * layer->format_->page_bytes();
  if (!layer->pages_.reserve(bytes))
    return error(StatusCode::out_of_memory, "pages", mebibytes(bytes) + " of address space", "none");
  layer->packed_.assign(static_cast<std::size_t>(k.blocks()), 0);
  layer->energies_.assign(static_cast<std::size_t>(g.q_heads * g.head_dim_k), 0.0);
  *out = std::move(layer);
  return {};
}

Status Layer::take_calibration() {
  const Calibration* measured = settings().calibration.get();
  if (measured == nullptr) return {};
  KV4_RETURN_IF_ERROR(measured->keys_of(k_.layer_number(), geometry_.kv_heads, geometry_.head_dim_k, &lambda_));
  if (k_.neighbours > 0) pair_neighbours(&lambda_, geometry_.head_dim_k, k_.neighbours);
  return measured->has_values()
             ? measured->values_of(v_.layer_number(), geometry_.kv_heads, geometry_.head_dim_v, &lambda_v_)
             : Status();
}

std::span<std::byte> Layer::scratch(std::size_t bytes) {
  thread_local std::vector<std::byte> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory;
}

PagedBatch Layer::batch() const {
  PagedBatch batch;
  batch.page_memory.data = reinterpret_cast<std::uint8_t*>(pages_.data());
  batch.page_memory.page_stride = static_cast<std::int64_t>(format_->page_bytes());
  batch.page_memory.head_stride = static_cast<std::int64_t>(format_->head_bytes());
  batch.row_memory = {.k = k_.data,
                      .v = v_.data,
                      .k_block_stride = kPageTokens * k_.channels,
                      .v_block_stride = kPageTokens * v_.channels,
                      .k_head_stride = geometry_.head_dim_k,
                      .v_head_stride = geometry_.head_dim_v,
                      .k_stride = k_.channels,
                      .v_stride = v_.channels};
  batch.page_count = batch.block_count = static_cast<std::int32_t>(k_.blocks());
  batch.lambda_k = lambda_.empty() ? nullptr : lambda_.data();
  batch.lambda_v = lambda_v_.empty() ? nullptr : lambda_v_.data();
  batch.sink_tokens = settings().recipe.sinks;
  return batch;
}

void Layer::keep_exact() {
  if (!packs_) return;
  const Status status = expose_all();
  packs_ = false;
  if (!status.ok()) say(GGML_LOG_LEVEL_ERROR, status.message());
}

// One block's page as rows of `to`'s block to_block. Sinks lie exact where they are; what comes out for them means
// nothing.
Status Layer::unpack(std::int64_t block, const RowMemory& to, std::int32_t to_block) {
  const auto page = static_cast<std::int32_t>(block);
  const std::int32_t length = kPageTokens;
  PagedBatch one = batch();
  one.size = 1;
  one.queries = kZeros;
  one.lengths = &length;
  one.sealed = kZeros;
  one.pages = &page;
  one.pages_stride = 1;
  one.blocks = &to_block;
  one.blocks_stride = 1;
  one.row_memory = to;
  std::size_t bytes = 0;
  KV4_RETURN_IF_ERROR(
      format_->workspace_bytes({.q_heads = geometry_.q_heads, .longest = kPageTokens, .all = kPageTokens}, &bytes));
  return format_->dequantise(one, {.begin = kBegin, .end = kEnd, .most = 1}, scratch(bytes));
}

Status Layer::expose(std::int64_t begin, std::int64_t end) {
  const std::size_t sinks = static_cast<std::size_t>(settings().recipe.sinks);
  for (std::int64_t b = begin; b < end; ++b) {
    if (packed_[static_cast<std::size_t>(b)] == 0) continue;
    std::vector<std::byte> k_sinks, v_sinks;
    if (first_of_stream(b)) {
      k_sinks.assign(k_.block(b), k_.block(b) + sinks * k_.row_bytes);
      v_sinks.assign(v_.block(b), v_.block(b) + sinks * v_.row_bytes);
    }
    KV4_RETURN_IF_ERROR(unpack(b, batch().row_memory, static_cast<std::int32_t>(b)));
    std::copy(k_sinks.begin(), k_sinks.end(), k_.block(b));
    std::copy(v_sinks.begin(), v_sinks.end(), v_.block(b));
    packed_[static_cast<std::size_t>(b)] = 0;
    Mapping::release(pages_.data() + static_cast<std::size_t>(b) * format_->page_bytes(), format_->page_bytes());
  }
  return {};
}

Status Layer::read(const Cells& side, std::int64_t block, std::byte* out) {
  if (packed_[static_cast<std::size_t>(block)] == 0) {
    std::memcpy(out, side.block(block), side.block_bytes());
    return {};
  }
  std::vector<std::byte> k(k_.block_bytes()), v(v_.block_bytes());
  RowMemory to = batch().row_memory;
  to.k = k.data();
  to.v = v.data();
  KV4_RETURN_IF_ERROR(unpack(block, to, 0));
  std::memcpy(out, &side == &k_ ? k.data() : v.data(), side.block_bytes());
  if (first_of_stream(block))
    std::memcpy(out, side.block(block), static_cast<std::size_t>(settings().recipe.sinks) * side.row_bytes);
  return {};
}

Status Layer::begin_write(std::int64_t first, std::int64_t count) {
  if (count == 0) return {};
  if (std::exchange(attended_, false)) KV4_RETURN_IF_ERROR(pack_due());
  return expose(k_.block_of(first), k_.block_of(first + count - 1) + 1);
}

void Layer::attended(const TensorView& q, int sequences) {
  if (!packs_) return;
  sequences_ = std::max(1, sequences);
  attended_ = true;
  if (lambda_.empty()) learn_queries(q);
}

Status Layer::settle() { return packs_ && any_packed_ ? pack_due() : Status(); }

Status Layer::pack_due() {
  if (!packs_) return {};
  const std::int64_t window = std::int64_t{settings().recipe.window} * sequences_;
  due_.clear();
  for (std::int64_t b = 0; b < k_.blocks(); ++b)
    if (packed_[static_cast<std::size_t>(b)] == 0 && k_.settled(b, window) && v_.settled(b, window) && k_.finite(b) &&
        v_.finite(b))
      due_.push_back(static_cast<std::int32_t>(b));
  if (due_.empty()) return {};
  if (lambda_.empty()) KV4_RETURN_IF_ERROR(learn_lambda(due_));
  // Those that begin a stream keep sinks.
  const auto rest = std::stable_partition(due_.begin(), due_.end(), [&](std::int32_t b) { return first_of_stream(b); });
  const auto firsts = static_cast<std::size_t>(rest - due_.begin());
  KV4_RETURN_IF_ERROR(pack(std::span(due_).first(firsts)));
  return pack(std::span(due_).subspan(firsts));
}

// Blocks that all begin a stream, or none of which does. Each is a sequence of one page.
Status Layer::pack(std::span<const std::int32_t> blocks) {
  if (blocks.empty()) return {};
  const std::size_t n = blocks.size();
  const std::vector<std::int32_t> zeros(n + 1, 0), lengths(n, kPageTokens);
  PagedBatch all = batch();
  all.size = static_cast<int>(n);
  all.queries = all.sealed = zeros.data();
  all.lengths = lengths.data();
  all.pages = all.blocks = blocks.data();
  all.pages_stride = all.blocks_stride = 1;
  if (first_of_stream(blocks.front())) all.sinks = blocks.data();
  std::size_t bytes = 0;
  KV4_RETURN_IF_ERROR(format_->workspace_bytes(
      {.sequences = all.size, .q_heads = geometry_.q_heads, .longest = kPageTokens, .all = kPageTokens * all.size},
      &bytes));
  KV4_RETURN_IF_ERROR(format_->seal(all, {.begin = zeros.data(), .end = lengths.data(), .most = 1}, scratch(bytes)));
  for (const std::int32_t b : blocks) {
    packed_[static_cast<std::size_t>(b)] = 1;
    release_rows(b);
  }
  any_packed_ = true;
  return {};
}

void Layer::release_rows(std::int64_t block) {
  const auto sinks = first_of_stream(block) ? static_cast<std::size_t>(settings().recipe.sinks) : 0;
  for (const Cells* side : {&k_, &v_})
    Mapping::release(side->block(block) + sinks * side->row_bytes, side->block_bytes() - sinks * side->row_bytes);
}

// Of queries only the mean square of each channel counts.
void Layer::learn_queries(const TensorView& q) {
  if (settings().recipe.key.lambda != LambdaMode::automatic || q.dtype != DType::f32) return;
  const int dim = geometry_.head_dim_k;
  for (std::int64_t h = 0; h < q.shape[1]; ++h) {
    double* const energy = energies_.data() + h * dim;
    for (std::int64_t t = 0; t < q.shape[2]; ++t) {
      const auto* row = static_cast<const float*>(q.at(0, h, t));
      for (int c = 0; c < dim; ++c)
        if (std::isfinite(row[c])) energy[c] += static_cast<double>(row[c]) * row[c];
    }
  }
  queries_ += q.shape[2];
}

// From the keys of the blocks that are packed first, as far as they follow one another; not from those with a stream's
// sinks, where there are others.
Status Layer::learn_lambda(std::span<const std::int32_t> due) {
  const Geometry& g = geometry_;
  lambda_.assign(static_cast<std::size_t>(g.kv_heads * g.head_dim_k), 1.0f);
  if (queries_ == 0) return {};
  if (due.size() > 1 && first_of_stream(due.front())) due = due.subspan(1);
  std::size_t run = 1;
  while (run < due.size() && due[run] == due[run - 1] + 1 && !first_of_stream(due[run])) ++run;
  std::vector<float> root(energies_.size());
  for (std::size_t i = 0; i < root.size(); ++i)
    root[i] = static_cast<float>(std::sqrt(energies_[i] / static_cast<double>(queries_)));
  const TensorView q{root.data(), DType::f32, {1, g.q_heads, 1, g.head_dim_k}, {0, g.head_dim_k, g.head_dim_k, 1}};
  const TensorView k{k_.block(due.front()),
                     dtype_,
                     {1, g.kv_heads, static_cast<std::int64_t>(run) * kPageTokens, g.head_dim_k},
                     {0, g.head_dim_k, k_.channels, 1}};
  return format_->learn_lambda(q, k, lambda_.data());
}

Status Layer::copy_stream(std::int64_t from, std::int64_t to) {
  const std::int64_t n = k_.blocks_of_stream(), source = from * n, target = to * n;
  const std::size_t page = format_->page_bytes(), sinks = static_cast<std::size_t>(settings().recipe.sinks);
  for (std::int64_t i = 0; i < n; ++i) {
    const bool packed = packed_[static_cast<std::size_t>(source + i)] != 0;
    const bool used = packed || k_.used(source + i) || v_.used(source + i);
    for (Cells* side : {&k_, &v_}) {
      if (used)
        std::memcpy(side->block(target + i), side->block(source + i),
                    packed ? (i == 0 ? sinks * side->row_bytes : 0) : side->block_bytes());
      if (!used) Mapping::release(side->block(target + i), side->block_bytes());
      side->take_history(target + i, *side, source + i);
    }
    if (packed)
      std::memcpy(pages_.data() + static_cast<std::size_t>(target + i) * page,
                  pages_.data() + static_cast<std::size_t>(source + i) * page, page);
    packed_[static_cast<std::size_t>(target + i)] = packed ? 1 : 0;
    if (packed) release_rows(target + i);
  }
  return {};
}

void Layer::forget() {
  std::fill(packed_.begin(), packed_.end(), std::uint8_t{0});
  Mapping::release(pages_.data(), pages_.size());
  attended_ = false;
  // What was learnt from is learnt from anew, but what pages were made with stays.
  if (any_packed_ || settings().calibration != nullptr) return;
  lambda_.clear();
  std::fill(energies_.begin(), energies_.end(), 0.0);
  queries_ = 0;
}

void Layer::held(std::size_t* exact, std::size_t* packed) const {
  const std::size_t rows = k_.block_bytes() + v_.block_bytes(),
                    sinks = static_cast<std::size_t>(settings().recipe.sinks) * (k_.row_bytes + v_.row_bytes);
  for (std::int64_t b = 0; b < k_.blocks(); ++b) {
    if (packed_[static_cast<std::size_t>(b)] != 0) {
      *packed += format_->page_bytes();
      *exact += first_of_stream(b) ? sinks : 0;
    } else if (k_.used(b) || v_.used(b)) {
      *exact += rows;
    }
  }
}

}  // namespace kv4::llama
