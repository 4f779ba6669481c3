#include "kv4_engine/context.h"

#include <ggml-cpu.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "context_state.h"
#include "kv4_engine/memory.h"
#include "log.h"
#include "model_state.h"

namespace kv4::engine {
namespace {

constexpr std::size_t kNodesPerLayer = 64, kNodesOutside = 64;

}  // namespace

Context::Context(std::unique_ptr<State> state) : state_(std::move(state)) {}
Context::~Context() = default;

Status Context::create(std::shared_ptr<const Model> model, const ContextOptions& options, std::unique_ptr<Context>* out) {
  const Config& config = model->state().config;
  auto state = std::make_unique<State>();
  state->model = std::move(model);
  state->options = options;
  ContextOptions& o = state->options;
  if (o.threads == 0) o.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (o.threads < 1 || o.threads > 512) return invalid_argument("threads", "1 to 512, or 0 for the machine's own", std::to_string(o.threads));
  if (o.batch < 1 || o.batch > 65536) return invalid_argument("batch", "1 to 65536", std::to_string(o.batch));
  if (o.context < 1 || o.context > config.context)
    return invalid_argument("context", "1 to " + std::to_string(config.context) + ", what the model was trained on", std::to_string(o.context));
  if (o.cache == CacheKind::f16) {
    KV4_RETURN_IF_ERROR(make_f16_store(config, o.context, &state->store));
  } else {
    KV4_RETURN_IF_ERROR(make_kv4_store(config, o.recipe, &state->store));
    KV4_RETURN_IF_ERROR(check_memory("context", state->most_cache_bytes()));
  }
  state->backend.reset(ggml_backend_cpu_init());
  if (!state->backend) return error(StatusCode::unsupported, "ggml", "a CPU backend", "none");
  ggml_backend_cpu_set_n_threads(state->backend.get(), o.threads);
  ggml_backend_cpu_set_abort_callback(
      state->backend.get(),
      [](void* data) {
        const State& s = *static_cast<State*>(data);
        return s.store->failed() || (s.stop != nullptr && s.stop->load(std::memory_order_relaxed));
      },
      state.get());
  out->reset(new Context(std::move(state)));
  return {};
}

// Of a full conversation: sealed bytes are 4.25 / 16 of float16 for kv4's recipe, whose exact rows are few.
std::uint64_t Context::State::most_cache_bytes() const {
  const Config& c = model->state().config;
  std::uint64_t bytes = 0;
  for (std::int64_t i = 0; i < c.layers; ++i) {
    const std::int64_t tokens = c.slides(i) ? std::min(options.context, c.sliding_window + options.batch) : options.context;
    bytes += 2 * static_cast<std::uint64_t>((c.head_dim_k + c.head_dim_v) * c.kv_heads * tokens);
  }
  return options.recipe.seal == SealMode::never ? bytes : bytes / 16 * 5;
}

Status Context::State::build(std::int64_t tokens, std::int64_t answers, Graph* out) {
  const LogCapture log;
  const Model::State& m = model->state();
  const Config& config = m.config;
  Graph g;
  g.tokens = tokens;
  g.answers = answers;
  g.key = store->graph_key(tokens);
  const std::size_t nodes = kNodesOutside + kNodesPerLayer * static_cast<std::size_t>(config.layers);
  g.context = describe(2 * nodes, nodes);
  ggml_context* c = g.context.get();
  if (c == nullptr) return error(StatusCode::out_of_memory, "graph", std::to_string(nodes) + " nodes' room", "none");
  g.graph = ggml_new_graph_custom(c, nodes, false);
  const auto input = [c](std::int64_t count) {
    ggml_tensor* t = ggml_new_tensor_1d(c, GGML_TYPE_I32, count);
    ggml_set_input(t);
    return t;
  };
  g.ids = input(tokens);
  g.positions = input(tokens);
  g.answered = answers < tokens ? input(answers) : nullptr;
  store->make_inputs(c, tokens);

  GraphBuilder builder(config, *m.weights, *store, c, g.graph, tokens);
  builder.set_inputs(g.positions, g.answered);
  ggml_tensor* x = ggml_get_rows(c, m.weights->find("token_embd.weight"), g.ids);
  if (m.architecture->embedding_scale != nullptr) x = ggml_scale(c, x, m.architecture->embedding_scale(config));
  for (std::int64_t i = 0; i < config.layers; ++i) x = m.architecture->layer(builder, i, x);
  x = builder.linear(builder.norm(x, "output_norm.weight"), "output");
  if (config.final_softcap > 0) x = ggml_scale(c, ggml_tanh(c, ggml_scale(c, x, 1.0f / config.final_softcap)), config.final_softcap);
  ggml_set_output(x);
  g.logits = x;
  ggml_build_forward_expand(g.graph, x);
  g.allocator.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  if (!g.allocator || !ggml_gallocr_alloc_graph(g.allocator.get(), g.graph))
    return error(StatusCode::out_of_memory, "batch", "memory for " + std::to_string(tokens) + " tokens", log.last());
  *out = std::move(g);
  return {};
}

Status Context::State::run(std::span<const std::int32_t> tokens, std::int64_t answers, bool* done) {
  const std::int64_t count = static_cast<std::int64_t>(tokens.size());
  // A batch of which nothing is asked still answers its last token: the graph has to end somewhere.
  const std::int64_t rows = std::max<std::int64_t>(1, answers);
  Graph& g = graphs[count == 1 ? 0 : 1];
  if (g.tokens != count || g.answers != rows || g.key != store->graph_key(count)) {
    g = Graph();  // its memory serves the next one
    KV4_RETURN_IF_ERROR(build(count, rows, &g));
  }
  const std::int64_t first = store->length();
  std::vector<std::int32_t> numbers(tokens.size());
  for (std::int64_t i = 0; i < count; ++i) numbers[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(first + i);
  ggml_backend_tensor_set(g.ids, tokens.data(), 0, tokens.size_bytes());
  ggml_backend_tensor_set(g.positions, numbers.data(), 0, numbers.size() * sizeof numbers[0]);
  if (g.answered != nullptr) {
    for (std::int64_t i = 0; i < rows; ++i) numbers[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(count - rows + i);
    ggml_backend_tensor_set(g.answered, numbers.data(), 0, static_cast<std::size_t>(rows) * sizeof numbers[0]);
  }
  store->fill_inputs(count);

  store->begin(options.threads);
  const ggml_status result = ggml_backend_graph_compute(backend.get(), g.graph);
  *done = result == GGML_STATUS_SUCCESS;
  KV4_RETURN_IF_ERROR(store->end(count, *done));
  if (result != GGML_STATUS_SUCCESS && result != GGML_STATUS_ABORTED)
    return error(StatusCode::out_of_memory, "batch", "a graph that ggml computes", ggml_status_to_string(result));
  if (!*done || answers == 0) return {};
  const std::size_t size = static_cast<std::size_t>(answers * model->vocabulary_size()), before = logits.size();
  logits.resize(before + size);
  ggml_backend_tensor_get(g.logits, logits.data() + before, 0, size * sizeof(float));
  return {};
}

Status Context::decode(std::span<const std::int32_t> tokens, std::int64_t answers, const std::atomic<bool>* stop, bool* stopped,
                       const std::function<void(std::int64_t)>& progress) {
  State& s = *state_;
  if (stopped != nullptr) *stopped = false;
  const std::int64_t count = static_cast<std::int64_t>(tokens.size()), before = s.store->length();
  if (count < 1) return invalid_argument("tokens", "at least one", "none");
  if (answers < 1 || answers > count) return invalid_argument("answers", "1 to " + std::to_string(count), std::to_string(answers));
  for (const std::int32_t t : tokens)
    if (t < 0 || t >= s.model->vocabulary_size())
      return invalid_argument("tokens", "tokens of 0 to " + std::to_string(s.model->vocabulary_size() - 1), std::to_string(t));
  if (before + count > s.options.context)
    return error(StatusCode::out_of_range, "tokens", "at most " + std::to_string(s.options.context - before) + " in a context of " + std::to_string(s.options.context),
                 std::to_string(count));
  s.logits.clear();
  s.stop = stop;
  // A single batch is taken back by the store itself. A mark of the caller's is moved: there is only one.
  const bool several = count > s.options.batch;
  if (several) KV4_RETURN_IF_ERROR(s.store->mark());
  Status status;
  bool done = true;
  for (std::int64_t first = 0; first < count && done; first += s.options.batch) {
    const std::int64_t size = std::min<std::int64_t>(s.options.batch, count - first);
    const std::int64_t asked = std::clamp<std::int64_t>(first + size - (count - answers), 0, size);
    status = s.run(tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(size)), asked, &done);
    if (!status.ok()) break;
    if (done && progress) progress(first + size);
  }
  s.stop = nullptr;
  Status back;
  if (several) {
    if (!status.ok() || !done) back = s.store->rewind();
    s.store->forget_mark();
  }
  if (status.ok() && done) return {};
  s.logits.clear();
  if (!status.ok()) return status;
  KV4_RETURN_IF_ERROR(back);
  if (stopped != nullptr) *stopped = true;
  return {};
}

std::span<const float> Context::logits() const { return state_->logits; }
std::int64_t Context::length() const { return state_->store->length(); }
Status Context::crop(std::int64_t length) {
  if (length < 0 || length > this->length())
    return error(StatusCode::out_of_range, "length", "0 to " + std::to_string(this->length()), std::to_string(length));
  return state_->store->crop(length);
}
Status Context::mark() { return state_->store->mark(); }
Status Context::rewind() { return state_->store->rewind(); }
std::size_t Context::cache_bytes() const { return state_->store->nbytes(); }
const ContextOptions& Context::options() const { return state_->options; }
const Model& Context::model() const { return *state_->model; }

}  // namespace kv4::engine
