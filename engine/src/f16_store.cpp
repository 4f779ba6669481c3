// ggml's own attention over float16 tensors: what kv4 is compared with inside one program. Sliding layers hold every token and
// mask the older ones.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kv4_engine/memory.h"
#include "store.h"

namespace kv4::engine {
namespace {

constexpr std::int64_t kPad = 256;  // keys of a graph: it is rebuilt every so many tokens

class F16Store final : public Store {
 public:
  Status make(const Config& config, std::int64_t context) {
    config_ = config;
    capacity_ = (context + kPad - 1) / kPad * kPad;
    context_ = describe(static_cast<std::size_t>(2 * config.layers));
    for (std::int64_t i = 0; i < config.layers; ++i) {
      k_.push_back(ggml_new_tensor_2d(context_.get(), GGML_TYPE_F16, config.head_dim_k * config.kv_heads, capacity_));
      v_.push_back(ggml_new_tensor_2d(context_.get(), GGML_TYPE_F16, config.head_dim_v * config.kv_heads, capacity_));
    }
    const std::uint64_t bytes = 2 * static_cast<std::uint64_t>((config.head_dim_k + config.head_dim_v) * config.kv_heads * capacity_ * config.layers);
    KV4_RETURN_IF_ERROR(check_memory("cache", bytes));
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), ggml_backend_cpu_buffer_type()));
    if (!buffer_) return error(StatusCode::out_of_memory, "cache", std::to_string(bytes) + " free bytes", "none");
    ggml_backend_buffer_clear(buffer_.get(), 0);  // masked rows are multiplied by 0, which leaves no trace of numbers alone
    return {};
  }

  ggml_tensor* attend(ggml_context* c, ggml_cgraph* graph, std::int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, float scale) override {
    const std::size_t l = static_cast<std::size_t>(layer);
    const auto append = [&](ggml_tensor* store, ggml_tensor* rows) {
      const std::int64_t width = rows->ne[0] * rows->ne[1];
      ggml_tensor* flat = ggml_is_contiguous(rows) ? ggml_reshape_2d(c, rows, width, rows->ne[2]) : ggml_cont_2d(c, rows, width, rows->ne[2]);
      ggml_build_forward_expand(graph, ggml_set_rows(c, store, flat, places_));
    };
    append(k_[l], k);
    append(v_[l], v);
    const auto held = [&](ggml_tensor* store, std::int64_t dim) {
      const std::size_t row = ggml_row_size(store->type, dim);
      return ggml_view_3d(c, store, dim, keys_, config_.kv_heads, store->nb[1], row, 0);
    };
    ggml_tensor* out = ggml_flash_attn_ext(c, ggml_permute(c, q, 0, 2, 1, 3), held(k_[l], config_.head_dim_k), held(v_[l], config_.head_dim_v),
                                           config_.slides(layer) ? local_mask_ : mask_, scale, 0.0f, 0.0f);
    return ggml_reshape_2d(c, out, out->ne[0] * out->ne[1], out->ne[2]);
  }

  std::int64_t graph_key(std::int64_t tokens) const override { return (length_ + tokens + kPad - 1) / kPad * kPad; }
  void make_inputs(ggml_context* c, std::int64_t tokens) override {
    keys_ = graph_key(tokens);
    const auto input = [](ggml_tensor* t) {
      ggml_set_input(t);
      return t;
    };
    places_ = input(ggml_new_tensor_1d(c, GGML_TYPE_I64, tokens));
    mask_ = input(ggml_new_tensor_2d(c, GGML_TYPE_F16, keys_, tokens));
    local_mask_ = config_.sliding_window > 0 ? input(ggml_new_tensor_2d(c, GGML_TYPE_F16, keys_, tokens)) : nullptr;
    inputs_[key(tokens)] = {places_, mask_, local_mask_};
  }
  void fill_inputs(std::int64_t tokens) override {
    const Inputs& in = inputs_[key(tokens)];
    std::vector<std::int64_t> places(static_cast<std::size_t>(tokens));
    for (std::int64_t i = 0; i < tokens; ++i) places[static_cast<std::size_t>(i)] = length_ + i;
    ggml_backend_tensor_set(in.places, places.data(), 0, places.size() * sizeof places[0]);
    fill_mask(in.mask, tokens, 0);
    if (in.local_mask != nullptr) fill_mask(in.local_mask, tokens, config_.sliding_window);
  }

  void begin(int) override {}
  bool failed() const override { return false; }
  Status end(std::int64_t tokens, bool ran) override {
    if (ran) length_ += tokens;
    return {};
  }
  Status mark() override {
    marked_ = length_;
    return {};
  }
  Status rewind() override { return crop(marked_); }
  void forget_mark() override {}
  std::int64_t length() const override { return length_; }
  Status crop(std::int64_t length) override {
    length_ = std::min(length_, length);
    return {};
  }
  std::size_t nbytes() const override { return ggml_backend_buffer_get_size(buffer_.get()); }
  Status save(const kv4::Sink&) const override { return error(StatusCode::unsupported, "session", "--cache kv4 or exact", "f16"); }
  Status load(const kv4::Source&) override { return error(StatusCode::unsupported, "session", "--cache kv4 or exact", "f16"); }

 private:
  struct Inputs {
    ggml_tensor *places, *mask, *local_mask;
  };
  // The graph of one token and that of several live side by side.
  static std::size_t key(std::int64_t tokens) { return tokens == 1 ? 0 : 1; }

  void fill_mask(ggml_tensor* mask, std::int64_t tokens, std::int64_t window) const {
    const std::int64_t keys = mask->ne[0];
    const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f), hidden = ggml_fp32_to_fp16(-INFINITY);
    std::vector<ggml_fp16_t> values(static_cast<std::size_t>(keys * tokens), hidden);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t last = length_ + t, first = window > 0 ? std::max<std::int64_t>(0, last - window + 1) : 0;
      std::fill(values.begin() + t * keys + first, values.begin() + t * keys + last + 1, seen);
    }
    ggml_backend_tensor_set(mask, values.data(), 0, values.size() * sizeof values[0]);
  }

  Config config_;
  std::int64_t capacity_ = 0, length_ = 0, marked_ = 0, keys_ = 0;
  GgmlContext context_;
  GgmlBuffer buffer_;
  std::vector<ggml_tensor*> k_, v_;
  ggml_tensor *places_ = nullptr, *mask_ = nullptr, *local_mask_ = nullptr;  // of the graph being built
  Inputs inputs_[2] = {};
};

}  // namespace

Status make_f16_store(const Config& config, std::int64_t context, std::unique_ptr<Store>* out) {
  auto store = std::make_unique<F16Store>();
  KV4_RETURN_IF_ERROR(store->make(config, context));
  *out = std::move(store);
  return {};
}

}  // namespace kv4::engine
