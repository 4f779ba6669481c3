// The public surface of a Cache.
#include "kv4/cache.h"

#include <algorithm>
#include <string>

#include "cache/state.h"
#include "format/guarded.h"

namespace kv4 {
namespace {

Status expect_room(const char* name, std::size_t need, std::size_t have, const char* unit) {
  return have == need ? Status() : invalid_argument(name, std::to_string(need) + unit, std::to_string(have));
}

const ledger::Extent& extent(const CacheState& c, int row) { return c.sequences[static_cast<std::size_t>(row)].ledger.extent(); }

}  // namespace

std::int64_t CacheState::longest() const {
  std::int64_t length = 0;
  for (const Sequence& s : sequences) length = std::max(length, s.length());
  return length;
}

std::int64_t CacheState::shortest() const {
  std::int64_t length = longest();
  for (const Sequence& s : sequences) length = std::min(length, s.length());
  return length;
}

Cache::Cache(std::unique_ptr<CacheState> state) : state_(std::move(state)) {}
Cache::~Cache() {
  if (state_) state_->on_stream();  // what it frees
}

Status Cache::create(const CacheConfig& config, std::unique_ptr<Cache>* out) {
  return guarded("cache", [&]() -> Status {
    auto state = std::make_unique<CacheState>();
    KV4_RETURN_IF_ERROR(Setup::make(config, &state->setup));
    const Setup& setup = *state->setup;
    if (setup.seals()) state->pool = std::make_shared<PagePool>(*setup.backend, setup.spec.layout.head_bytes, setup.heads());
    out->reset(new Cache(std::move(state)));
    return {};
  });
}

Status Cache::append(const TensorView& k, const TensorView& v) {
  return guarded("cache", [&] { return kv4::append(state_->on_stream(), nullptr, k, v); });
}
Status Cache::append(std::span<const RowCount> rows, const TensorView& k, const TensorView& v) {
  return guarded("cache", [&] { return kv4::append(state_->on_stream(), &rows, k, v); });
}
Status Cache::attend(const AttendArgs& args, const MutableTensorView& out) {
  return guarded("cache", [&] { return kv4::attend(state_->on_stream(), nullptr, args, kMostTokens, &out, nullptr); });
}
Status Cache::attend(std::span<const RowCount> rows, const AttendArgs& args, const MutableTensorView& out) {
  return guarded("cache", [&] { return kv4::attend(state_->on_stream(), &rows, args, kMostTokens, &out, nullptr); });
}
Status Cache::attend_partial(const AttendArgs& args, std::int64_t upto, const PartialState& out) {
  return guarded("cache", [&] { return kv4::attend(state_->on_stream(), nullptr, args, upto, nullptr, &out); });
}
Status Cache::seal() {
  return guarded("cache", [&] { return kv4::seal(state_->on_stream()); });
}
Status Cache::crop(std::int64_t length) {
  return guarded("cache", [&] { return kv4::crop(state_->on_stream(), length); });
}
Status Cache::crop(int row, std::int64_t length) {
  return guarded("cache", [&] { return kv4::crop(state_->on_stream(), row, length); });
}
Status Cache::erase(int row, std::int64_t first, std::int64_t count) {
  return guarded("cache", [&] { return kv4::erase(state_->on_stream(), row, first, count); });
}
Status Cache::add(int count) {
  return guarded("cache", [&] { return kv4::add(state_->on_stream(), count); });
}
Status Cache::remove(std::span<const std::int64_t> rows) {
  return guarded("cache", [&] { return kv4::remove(state_->on_stream(), rows); });
}
Status Cache::select(std::span<const std::int64_t> rows) {
  return guarded("cache", [&] { return kv4::select(state_->on_stream(), rows); });
}
Status Cache::repeat(int times) {
  return guarded("cache", [&] { return kv4::repeat(state_->on_stream(), times); });
}
Status Cache::reserve(std::int64_t tokens) {
  return guarded("cache", [&] { return kv4::reserve(state_->on_stream(), tokens); });
}
Status Cache::advance() {
  return guarded("cache", [&] { return kv4::advance(state_->on_stream()); });
}
Status Cache::save(const Sink& sink) const {
  return guarded("cache", [&] { return kv4::save(state_->on_stream(), sink); });
}
Status Cache::load(const Source& source) {
  return guarded("cache", [&] { return kv4::load(state_->on_stream(), source); });
}
Status Cache::dense_keys(std::int64_t first, std::int64_t count, const MutableTensorView& out) const {
  return guarded("cache", [&] { return dense(state_->on_stream(), true, first, count, out); });
}
Status Cache::dense_values(std::int64_t first, std::int64_t count, const MutableTensorView& out) const {
  return guarded("cache", [&] { return dense(state_->on_stream(), false, first, count, out); });
}
Status Cache::lambda(int row, std::vector<float>* out) const {
  return guarded("cache", [&] { return kv4::lambda(state_->on_stream(), row, out); });
}

void Cache::set_stream(void* stream) {
  state_->stream = stream;
  state_->on_stream();
}

void Cache::reset() {
  state_->on_stream().sequences.clear();
  ++state_->version;
}

Status Cache::clone(std::unique_ptr<Cache>* out) const {
  return guarded("cache", [&] {
    CacheState& held = state_->on_stream();
    auto copy = std::make_unique<CacheState>();
    copy->setup = held.setup;
    copy->pool = held.pool;
    copy->stream = held.stream;
    copy->version = held.version;
    copy->recording = held.recording;
    copy->sequences.reserve(held.sequences.size());
    for (Sequence& s : held.sequences) copy->sequences.push_back(s.fork());
    out->reset(new Cache(std::move(copy)));
    return Status();
  });
}

void Cache::record_past(bool on) { state_->recording = on; }

std::size_t Cache::nbytes() const { return kv4::nbytes(*state_); }
std::vector<SharedMemory> Cache::shared() const { return kv4::shared(*state_); }
const CacheConfig& Cache::config() const { return state_->setup->config; }
int Cache::batch() const { return static_cast<int>(state_->batch()); }
std::int64_t Cache::length() const { return state_->longest(); }
std::int64_t Cache::length(int row) const { return extent(*state_, row).length; }
std::int64_t Cache::first() const {
  std::int64_t first = 0;
  for (const Sequence& s : state_->sequences) first = std::max(first, s.ledger.extent().evicted);
  return first;
}
bool Cache::lambda_fixed(int row) const { return state_->sequences[static_cast<std::size_t>(row)].lambda_fixed(); }
std::int64_t Cache::sealed_tokens(int row) const { return extent(*state_, row).sealed_tokens(); }
std::int64_t Cache::exact_tokens(int row) const { return extent(*state_, row).sinks + extent(*state_, row).window_rows(); }
std::uint64_t Cache::version() const { return state_->version; }
int Cache::page_count(int row) const { return static_cast<int>(extent(*state_, row).pages); }

Status Cache::page_codes(int row, int index, int head, std::span<std::uint8_t> k, std::span<std::uint8_t> v) const {
  return guarded("cache", [&]() -> Status {
    const CacheState& c = state_->on_stream();
    const std::uint8_t* slice = nullptr;
    KV4_RETURN_IF_ERROR(find_slice(c, row, index, head, &slice));
    const auto bytes = [](int dim) { return static_cast<std::size_t>(kPageTokens) * static_cast<std::size_t>(dim) / 2; };
    KV4_RETURN_IF_ERROR(expect_room("k", bytes(config().head_dim_k), k.size(), " bytes"));
    KV4_RETURN_IF_ERROR(expect_room("v", bytes(config().head_dim_v), v.size(), " bytes"));
    return c.backend().codes_to_canonical(c.setup->spec, slice, k.data(), v.data());
  });
}

Status Cache::page_scales(int row, int index, int head, std::span<std::uint16_t> k, std::span<std::uint16_t> v) const {
  return guarded("cache", [&]() -> Status {
    const CacheState& c = state_->on_stream();
    const std::uint8_t* slice = nullptr;
    KV4_RETURN_IF_ERROR(find_slice(c, row, index, head, &slice));
    const PageSpec& spec = c.setup->spec;
    const auto count = [](int groups) { return static_cast<std::size_t>(groups * kPageTokens); };
    KV4_RETURN_IF_ERROR(expect_room("k", count(spec.key.groups), k.size(), " scales"));
    KV4_RETURN_IF_ERROR(expect_room("v", count(spec.value.groups), v.size(), " scales"));
    KV4_RETURN_IF_ERROR(c.backend().copy(k.data(), slice + spec.layout.k_scales, k.size_bytes()));
    return c.backend().copy(v.data(), slice + spec.layout.v_scales, v.size_bytes());
  });
}

}  // namespace kv4
