// kv4 inside a ggml graph: one custom operation a layer appends the tokens and answers their queries, on ggml's threads.
#include <ggml-cpu.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "store.h"
#include "team.h"

namespace kv4::engine {
namespace {

class Kv4Store final : public Store {
 public:
  struct Layer {
    Kv4Store* owner = nullptr;
    std::unique_ptr<Cache> cache, marked;
    float scale = 0;
    std::vector<ggml_fp16_t> k, v;  // a call's rows, rounded to what the cache holds
  };

  Status make(const Config& config, const Recipe& recipe) {
    layers_.resize(static_cast<std::size_t>(config.layers));
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      CacheConfig c;
      c.recipe = recipe;
      c.dtype = DType::f16;
      c.kv_heads = static_cast<int>(config.kv_heads);
      c.head_dim_k = static_cast<int>(config.head_dim_k);
      c.head_dim_v = static_cast<int>(config.head_dim_v);
      c.sliding_window = config.slides(static_cast<std::int64_t>(i)) ? static_cast<int>(config.sliding_window) : 0;
      layers_[i].owner = this;
      KV4_RETURN_IF_ERROR(Cache::create(c, &layers_[i].cache));
    }
    return {};
  }

  ggml_tensor* attend(ggml_context* context, ggml_cgraph*, std::int64_t layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v, float scale) override {
    Layer& l = layers_[static_cast<std::size_t>(layer)];
    l.scale = scale;
    ggml_tensor* arguments[] = {q, k, v};
    ggml_tensor* out = ggml_custom_4d(context, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2], 1, arguments, 3, run, GGML_N_TASKS_MAX, &l);
    return ggml_reshape_2d(context, out, out->ne[0] * out->ne[1], out->ne[2]);
  }
  std::int64_t graph_key(std::int64_t) const override { return 0; }
  void make_inputs(ggml_context*, std::int64_t) override {}
  void fill_inputs(std::int64_t) override {}

  void begin(int threads) override {
    team_.reset(threads);
    failed_.store(false, std::memory_order_relaxed);
    failure_ = {};
  }
  bool failed() const override { return failed_.load(std::memory_order_relaxed); }
  Status end(std::int64_t tokens, bool ran) override {
    if (ran && !failed()) {
      length_ += tokens;
      return {};
    }
    KV4_RETURN_IF_ERROR(crop(length_));  // the layers that the run came to
    return failure_;
  }

  // A cache that neither seals nor slides loses nothing that a crop would miss. Clones of the others share their pages.
  Status mark() override {
    std::vector<std::unique_ptr<Cache>> marked(layers_.size());
    for (std::size_t i = 0; i < layers_.size(); ++i)
      if (const Cache& cache = *layers_[i].cache; cache.config().recipe.seal != SealMode::never || cache.config().sliding_window > 0)
        KV4_RETURN_IF_ERROR(cache.clone(&marked[i]));
    for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].marked = std::move(marked[i]);
    marked_ = length_;
    return {};
  }
  Status rewind() override {
    for (Layer& l : layers_) {
      if (l.marked)
        KV4_RETURN_IF_ERROR(l.marked->clone(&l.cache));
      else if (marked_ == 0)
        l.cache->reset();
      else if (l.cache->length() > marked_)
        KV4_RETURN_IF_ERROR(l.cache->crop(marked_));
    }
    length_ = marked_;
    return {};
  }
  void forget_mark() override {
    for (Layer& l : layers_) l.marked.reset();
  }

  std::int64_t length() const override { return length_; }
  Status crop(std::int64_t length) override {
    for (Layer& l : layers_) {
      if (length == 0)
        l.cache->reset();
      else if (l.cache->length() > length)
        KV4_RETURN_IF_ERROR(l.cache->crop(length));
    }
    length_ = length;
    return {};
  }
  std::size_t nbytes() const override {
    std::size_t bytes = 0;
    std::set<const void*> counted;  // what layers share counts once
    for (const Layer& l : layers_) {
      bytes += l.cache->nbytes();
      for (const SharedMemory& memory : l.cache->shared())
        if (!counted.insert(memory.identity).second) bytes -= memory.bytes;
    }
    return bytes;
  }

  Status save(const kv4::Sink& sink) const override {
    // What is due goes out as pages already, as the next call would make them; the layers themselves stay as they are.
    for (const Layer& l : layers_) {
      std::unique_ptr<Cache> sealed;
      KV4_RETURN_IF_ERROR(l.cache->clone(&sealed));
      KV4_RETURN_IF_ERROR(sealed->seal());
      KV4_RETURN_IF_ERROR(sealed->save(sink));
    }
    return {};
  }
  Status load(const kv4::Source& source) override {
    Status status;
    for (Layer& l : layers_)
      if (status = l.cache->load(source); !status.ok()) break;
    if (status.ok()) {
      length_ = layers_.front().cache->length();
      for (const Layer& l : layers_)
        if (l.cache->length() != length_)
          status = invalid_argument("session", "as many tokens in every layer", std::to_string(l.cache->length()) + " and " + std::to_string(length_));
    }
    if (!status.ok()) static_cast<void>(crop(0));
    return status;
  }

 private:
  static TensorView view(const ggml_tensor* t) {  // [channels, heads, tokens] of f32
    const std::int64_t size = sizeof(float);
    return {t->data,
            DType::f32,
            {1, t->ne[1], t->ne[2], t->ne[0]},
            {0, static_cast<std::int64_t>(t->nb[1]) / size, static_cast<std::int64_t>(t->nb[2]) / size, 1}};
  }
  // The same rounded to float16, [tokens, heads, channels] in `buffer`.
  static TensorView rounded(const ggml_tensor* t, std::vector<ggml_fp16_t>* buffer) {
    const std::int64_t dim = t->ne[0], heads = t->ne[1], tokens = t->ne[2];
    buffer->resize(static_cast<std::size_t>(dim * heads * tokens));
    ggml_fp16_t* to = buffer->data();
    for (std::int64_t i = 0; i < tokens; ++i)
      for (std::int64_t h = 0; h < heads; ++h, to += dim)
        ggml_cpu_fp32_to_fp16(reinterpret_cast<const float*>(static_cast<const std::byte*>(t->data) + h * static_cast<std::int64_t>(t->nb[1]) + i * static_cast<std::int64_t>(t->nb[2])),
                              to, dim);
    return {buffer->data(), DType::f16, {1, heads, tokens, dim}, {0, dim, heads * dim, 1}};
  }

  static void run(ggml_tensor* out, int thread, int threads, void* layer) {
    Layer& l = *static_cast<Layer*>(layer);
    if (thread > 0) return l.owner->team_.follow(thread);
    l.owner->team_.lead(threads, [&] {
      if (l.owner->failed()) return;
      const Status status = step(l, out);
      if (status.ok()) return;
      l.owner->failure_ = status;
      l.owner->failed_.store(true, std::memory_order_relaxed);
    });
  }
  static Status step(Layer& l, ggml_tensor* out) {
    KV4_RETURN_IF_ERROR(l.cache->append(rounded(out->src[1], &l.k), rounded(out->src[2], &l.v)));
    AttendArgs args;
    args.q = view(out->src[0]);
    args.scale = l.scale;
    const TensorView o = view(out);
    return l.cache->attend(args, {out->data, DType::f32, o.shape, o.stride});
  }

  Team team_;
  std::vector<Layer> layers_;
  std::int64_t length_ = 0, marked_ = 0;
  std::atomic<bool> failed_{false};
  Status failure_;
};

}  // namespace

Status make_kv4_store(const Config& config, const Recipe& recipe, std::unique_ptr<Store>* out) {
  auto store = std::make_unique<Kv4Store>();
  KV4_RETURN_IF_ERROR(store->make(config, recipe));
  *out = std::move(store);
  return {};
}

}  // namespace kv4::engine
