// Construction, the public surface and the byte count of a Cache. Its work is done by State.
#include "kv4/cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <set>
#include <stdexcept>
#include <string>

#include "backend/spec.h"
#include "cache/state.h"

namespace kv4 {
namespace {

std::string shape_text(std::size_t have) { return std::to_string(have) + " values"; }

// Positive finite numbers, one per head and channel, where the recipe asks for them.
Status check_lambda(const char* name, bool wanted, const std::vector<float>& values, int heads, int dim) {
  if (!wanted) {
    if (values.empty()) return {};
    return invalid_argument(name, "nothing, since the recipe's lambda is not 'given'", shape_text(values.size()));
  }
  const std::size_t count = static_cast<std::size_t>(heads) * dim;
  if (values.size() != count)
    return invalid_argument(name, std::to_string(heads) + " x " + std::to_string(dim) + " values", shape_text(values.size()));
  for (std::size_t i = 0; i < count; ++i)
    if (!(values[i] > 0) || !std::isfinite(values[i]))
      return invalid_argument(name, "positive finite values", std::to_string(values[i]) + " at index " + std::to_string(i));
  return {};
}

// What runs out of the host's memory says so; calls change what is held once they can no longer run out.
template <class Call>
Status guarded(Call call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {  // of a vector
  }
  return error(StatusCode::out_of_memory, "cache", "free memory of the host", "none");
}

}  // namespace

Cache::Cache(std::unique_ptr<State> state) : state_(std::move(state)) {}
Cache::~Cache() {
  if (state_) state_->on_stream();  // what it frees
}

Status Cache::create(const CacheConfig& config, std::unique_ptr<Cache>* out) {
  return guarded([&] { return State::create(config, out); });
}

Status Cache::State::create(const CacheConfig& config, std::unique_ptr<Cache>* out) {
  const auto positive = [](const char* name, int value) {
    return value > 0 ? Status() : invalid_argument(name, "at least 1", std::to_string(value));
  };
  KV4_RETURN_IF_ERROR(positive("kv_heads", config.kv_heads));
  KV4_RETURN_IF_ERROR(positive("head_dim_k", config.head_dim_k));
  KV4_RETURN_IF_ERROR(positive("head_dim_v", config.head_dim_v));
  if (config.sliding_window < 0)
    return invalid_argument("sliding_window", "0 (none) or more", std::to_string(config.sliding_window));
  if (config.dtype != DType::f32 && config.dtype != DType::f16 && config.dtype != DType::bf16)
    return invalid_argument("dtype", "float32, float16 or bfloat16", std::to_string(static_cast<int>(config.dtype)));
  const Recipe& recipe = config.recipe;
  KV4_RETURN_IF_ERROR(validate(recipe));
  const bool seals = recipe.seal != SealMode::never;
  KV4_RETURN_IF_ERROR(check_lambda("lambda_k", seals && recipe.key.lambda == LambdaMode::given, config.lambda_k,
                                   config.kv_heads, config.head_dim_k));
  KV4_RETURN_IF_ERROR(check_lambda("lambda_v", seals && recipe.value.lambda == LambdaMode::given, config.lambda_v,
                                   config.kv_heads, config.head_dim_v));

  auto state = std::make_unique<State>(std::make_shared<CacheConfig>(config));
  state->shape = {config.kv_heads, config.head_dim_k, config.head_dim_v, config.dtype};
  state->backend = find_backend(config.backend);
  if (state->backend == nullptr) {
    std::string names;
    for (const std::string& name : backends()) names += (names.empty() ? "" : ", ") + name;
    return invalid_argument("backend", "one of " + names, config.backend);
  }
  KV4_RETURN_IF_ERROR(state->backend->supports_rows(config.head_dim_k, config.head_dim_v, config.dtype, recipe.seal));
  state->on_stream();  // its own, null until set_stream, and not that of this thread's last call, which may be gone
  const auto given = [&](const std::vector<float>& values, const char* name, std::shared_ptr<Block>* block) {
    return Block::copy_of(*state->backend, name, values.data(), values.size() * sizeof(float), block);
  };
  KV4_RETURN_IF_ERROR(given(config.lambda_k, "lambda_k", &state->given_k));
  KV4_RETURN_IF_ERROR(given(config.lambda_v, "lambda_v", &state->given_v));
  if (state->given_k || state->given_v) KV4_RETURN_IF_ERROR(state->backend->wait());  // read on streams that know nothing of this one
  if (seals) {
    KV4_RETURN_IF_ERROR(validate(recipe, config.head_dim_k, config.head_dim_v));
    PageSpec& spec = state->spec;
    KV4_RETURN_IF_ERROR(make_sides(recipe, config.head_dim_k, config.head_dim_v, config.matrix_k, config.matrix_v, &spec));
    spec.layout = kv4_make_page_layout(static_cast<std::uint32_t>(config.head_dim_k), static_cast<std::uint32_t>(config.head_dim_v),
                                       static_cast<std::uint32_t>(spec.key.groups), static_cast<std::uint32_t>(spec.value.groups),
                                       spec.key.mean, static_cast<std::uint32_t>(state->backend->code_channels(config.head_dim_k)),
                                       static_cast<std::uint32_t>(state->backend->code_channels(config.head_dim_v)));
    KV4_RETURN_IF_ERROR(state->backend->supports(spec));
    state->pool = std::make_shared<PagePool>(*state->backend, static_cast<std::size_t>(spec.layout.head_bytes) * config.kv_heads);
  }
  out->reset(new Cache(std::move(state)));
  return {};
}

Status Cache::append(const TensorView& k, const TensorView& v) {
  return guarded([&] { return state_->on_stream().append(k, v); });
}
Status Cache::attend(const AttendArgs& args, const MutableTensorView& out) {
  return guarded([&] { return state_->on_stream().attend(args, state_->length, &out, nullptr); });
}
Status Cache::attend_partial(const AttendArgs& args, std::int64_t upto, const PartialState& out) {
  return guarded([&] { return state_->on_stream().attend(args, upto, nullptr, &out); });
}
Status Cache::seal() {
  return guarded([&] { return state_->on_stream().seal(); });
}
Status Cache::crop(std::int64_t length) {
  return guarded([&] { return state_->on_stream().crop(length); });
}
Status Cache::reserve(std::int64_t tokens) {
  return guarded([&] { return state_->on_stream().reserve(tokens); });
}
Status Cache::save(const Sink& sink) const {
  return guarded([&] { return state_->on_stream().save(sink); });
}
Status Cache::load(const Source& source) {
  return guarded([&] { return state_->on_stream().load(source); });
}
Status Cache::advance() {
  return guarded([&] { return state_->on_stream().advance(); });
}
void Cache::set_stream(void* stream) {
  state_->stream = stream;
  state_->on_stream();
}

Status Cache::State::select(std::span<const std::int64_t> rows) {
  const std::int64_t batch = static_cast<std::int64_t>(sequences.size());
  for (std::size_t i = 0; i < rows.size(); ++i)
    if (rows[i] < 0 || rows[i] >= batch)
      return error(StatusCode::out_of_range, "rows", "indices from 0 to " + std::to_string(batch - 1),
                   std::to_string(rows[i]) + " at " + std::to_string(i));
  std::vector<Sequence> next;
  next.reserve(rows.size());
  for (std::int64_t row : rows) {
    next.push_back(sequences[static_cast<std::size_t>(row)]);
    next.back().fork();
  }
  sequences = std::move(next);
  if (sequences.empty()) length = 0;
  ++version;
  return {};
}

Status Cache::select(std::span<const std::int64_t> rows) {
  return guarded([&] { return state_->on_stream().select(rows); });
}

Status Cache::repeat(int times) {
  if (times < 1) return invalid_argument("times", "at least 1", std::to_string(times));
  const int most = std::numeric_limits<int>::max() / std::max(1, batch());
  if (times > most) return error(StatusCode::out_of_range, "times", "at most " + std::to_string(most), std::to_string(times));
  return guarded([&] {
    std::vector<std::int64_t> rows;
    for (std::size_t i = 0; i < state_->sequences.size(); ++i) rows.insert(rows.end(), static_cast<std::size_t>(times), static_cast<std::int64_t>(i));
    return state_->on_stream().select(rows);
  });
}

void Cache::reset() {
  state_->on_stream();
  state_->sequences.clear();
  state_->length = 0;
  ++state_->version;
}

Status Cache::clone(std::unique_ptr<Cache>* out) const {
  return guarded([&] {
    auto copy = std::make_unique<State>(*state_);
    std::unique_ptr<Cache> fork(new Cache(std::move(copy)));
    // Which of the two goes on first does not matter: neither writes to what they share.
    for (State* state : {state_.get(), fork->state_.get()})
      for (Sequence& s : state->sequences) s.fork();
    *out = std::move(fork);
    return Status();
  });
}

void Cache::record_past(bool on) { state_->recording = on; }

Status Cache::dense_keys(std::int64_t first, std::int64_t count, const MutableTensorView& out) const {
  return guarded([&] { return state_->on_stream().dense(true, first, count, out); });
}
Status Cache::dense_values(std::int64_t first, std::int64_t count, const MutableTensorView& out) const {
  return guarded([&] { return state_->on_stream().dense(false, first, count, out); });
}

std::size_t Cache::nbytes() const {
  const State& s = *state_;
  std::size_t sum = sizeof(Cache) + sizeof(State);
  if (s.pool) sum += s.pool->bytes();
  std::set<const void*> counted;  // forks share rows and lambda: each block counts once
  for (const Sequence& q : s.sequences) {
    for (const RowBuffer* rows : {&q.sinks, &q.window})
      if (rows->identity() != nullptr && counted.insert(rows->identity()).second) sum += rows->bytes();
    const auto count_block = [&](const std::shared_ptr<Block>& block) {
      if (block && counted.insert(block.get()).second) sum += block->bytes() + sizeof(Block);
    };
    count_block(q.lambda);
    for (const std::shared_ptr<Block>& row : q.query_energy.rows) count_block(row);
    for (const Told& told : q.notes) sum += sizeof(Told) + (counted.insert(told.note.get()).second ? sizeof(LateNote) : 0);
    sum += q.pages.bytes() + q.seen.capacity() + q.non_finite.capacity() * sizeof(NonFinite) +
           q.query_energy.rows.capacity() * sizeof(q.query_energy.rows[0]);
  }
  sum += s.sequences.capacity() * sizeof(Sequence) + s.views.capacity() * sizeof(SequenceView) +
         s.found.capacity() * sizeof(s.found[0]) + s.news.capacity() * sizeof(s.news[0]) + s.energies.capacity() * sizeof(EnergyJob) +
         s.windows.capacity() * sizeof(std::int32_t) + s.jobs.capacity() * sizeof(SealJob) + s.masked.capacity();
  sum += sizeof(CacheConfig) + (s.config.lambda_k.capacity() + s.config.lambda_v.capacity() + s.config.matrix_k.capacity() +
                                s.config.matrix_v.capacity()) * sizeof(float);
  for (const Block* block : {s.given_k.get(), s.given_v.get()}) sum += block != nullptr ? block->bytes() : 0;
  if (s.own.tables) sum += s.own.tables->bytes();
  for (const SharedMemory& memory : shared()) sum += memory.bytes;
  return sum;
}

std::vector<SharedMemory> Cache::shared() const {
  std::vector<SharedMemory> all;
  const auto add = [&all](const void* identity, std::size_t bytes, bool on_device) {
    for (const SharedMemory& memory : all)
      if (memory.identity == identity) return;
    all.push_back({identity, bytes, on_device});
  };
  for (const SideSpec* side : {&state_->spec.key, &state_->spec.value}) {
    if (side->rotation == nullptr) continue;  // of a recipe that never seals
    add(side->rotation.get(), side->rotation->bytes(), false);
    if (const RotationTable* table = state_->backend->table_of(*side->rotation); table != nullptr) add(table, table->bytes(), true);
  }
  return all;
}

const CacheConfig& Cache::config() const { return state_->config; }
int Cache::batch() const { return static_cast<int>(state_->sequences.size()); }
std::int64_t Cache::length() const { return state_->length; }
std::int64_t Cache::first() const {
  std::int64_t first = 0;
  for (const Sequence& s : state_->sequences) first = std::max(first, s.evicted);
  return first;
}
bool Cache::lambda_fixed(int row) const { return state_->lambda_fixed(state_->sequences[static_cast<std::size_t>(row)]); }
std::int64_t Cache::sealed_tokens(int row) const { return state_->sequences[static_cast<std::size_t>(row)].sealed_tokens(); }
std::int64_t Cache::exact_tokens(int row) const {
  const Sequence& s = state_->sequences[static_cast<std::size_t>(row)];
  return s.sinks.count() + s.window.count();
}
std::uint64_t Cache::version() const { return state_->version; }

Status Cache::lambda(int row, std::vector<float>* out) const {
  return guarded([&] { return state_->copy_lambda(row, out); });
}

Status Cache::State::copy_lambda(int row, std::vector<float>* out) const {
  out->clear();
  const float* values = lambda_k(sequences[static_cast<std::size_t>(row)], 0);
  if (values == nullptr) return {};
  out->resize(static_cast<std::size_t>(config.kv_heads) * config.head_dim_k);
  backend->set_stream(stream);
  return backend->copy(out->data(), values, out->size() * sizeof(float));
}

int Cache::page_count(int row) const { return static_cast<int>(state_->sequences[static_cast<std::size_t>(row)].pages.size()); }

// The head slice that a tool asks for by number.
Status Cache::State::find_slice(int row, int index, int head, const std::uint8_t** out) const {
  const auto in_range = [](const char* name, int value, std::size_t end) {
    return value >= 0 && value < static_cast<int>(end)
               ? Status()
               : error(StatusCode::out_of_range, name, "0 to " + std::to_string(static_cast<int>(end) - 1), std::to_string(value));
  };
  KV4_RETURN_IF_ERROR(in_range("row", row, sequences.size()));
  const PageList& pages = sequences[static_cast<std::size_t>(row)].pages;
  KV4_RETURN_IF_ERROR(in_range("index", index, pages.size()));
  KV4_RETURN_IF_ERROR(in_range("head", head, static_cast<std::size_t>(config.kv_heads)));
  *out = slice(pages[static_cast<std::size_t>(index)], head);
  return {};
}

namespace {

Status expect_room(const char* name, std::size_t need, std::size_t have, const char* unit) {
  return have == need ? Status() : invalid_argument(name, std::to_string(need) + unit, std::to_string(have));
}

}  // namespace

Status Cache::page_codes(int row, int index, int head, std::span<std::uint8_t> k, std::span<std::uint8_t> v) const {
  return guarded([&]() -> Status {
    const State& s = *state_;
    const std::uint8_t* slice = nullptr;
    KV4_RETURN_IF_ERROR(s.find_slice(row, index, head, &slice));
    const auto bytes = [](int dim) { return static_cast<std::size_t>(kPageTokens) * static_cast<std::size_t>(dim) / 2; };
    KV4_RETURN_IF_ERROR(expect_room("k", bytes(s.config.head_dim_k), k.size(), " bytes"));
    KV4_RETURN_IF_ERROR(expect_room("v", bytes(s.config.head_dim_v), v.size(), " bytes"));
    return state_->on_stream().backend->codes_to_canonical(s.spec, slice, k.data(), v.data());
  });
}

Status Cache::page_scales(int row, int index, int head, std::span<std::uint16_t> k, std::span<std::uint16_t> v) const {
  return guarded([&]() -> Status {
    const State& s = *state_;
    const std::uint8_t* slice = nullptr;
    KV4_RETURN_IF_ERROR(s.find_slice(row, index, head, &slice));
    const auto count = [](int groups) { return static_cast<std::size_t>(groups * kPageTokens); };
    KV4_RETURN_IF_ERROR(expect_room("k", count(s.spec.key.groups), k.size(), " scales"));
    KV4_RETURN_IF_ERROR(expect_room("v", count(s.spec.value.groups), v.size(), " scales"));
    KV4_RETURN_IF_ERROR(state_->on_stream().backend->copy(k.data(), slice + s.spec.layout.k_scales, k.size_bytes()));
    return s.backend->copy(v.data(), slice + s.spec.layout.v_scales, v.size_bytes());
  });
}

}  // namespace kv4
