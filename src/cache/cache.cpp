// The public surface of a Cache.
#include "kv4/cache.h"

#include <algorithm>
#include <string>

#include "cache/state.h"
#include "format/guarded.h"

namespace kv4 {
namespace {

// Runs an operation on the cache's stream. It may throw bad_alloc only before it changes the cache.
template <class Verb, class... Args>
Status call(CacheState& c, Verb verb, const Args&... args) {
  return guarded("cache", [&] { return verb(c.on_stream(), args...); });
}

const ledger::Extent& extent(const CacheState& c, int row) {
  return c.sequences[static_cast<std::size_t>(row)].ledger.extent();
}

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
  if (state_) state_->on_stream();  // memory is freed in stream order
}

Status Cache::create(const CacheConfig& config, std::unique_ptr<Cache>* out) {
  return guarded("cache", [&]() -> Status {
    auto state = std::make_unique<CacheState>();
    KV4_RETURN_IF_ERROR(Setup::make(config, &state->setup));
    const Setup& setup = *state->setup;
    if (setup.seals())
      state->pool = std::make_shared<PagePool>(*setup.backend, setup.spec.layout.head_bytes, setup.heads());
    out->reset(new Cache(std::move(state)));
    return {};
  });
}

Status Cache::append(const TensorView& k, const TensorView& v) { return call(*state_, kv4::append, nullptr, k, v); }
Status Cache::append(std::span<const RowCount> rows, const TensorView& k, const TensorView& v) {
  return call(*state_, kv4::append, &rows, k, v);
}
Status Cache::attend(const AttendArgs& args, const MutableTensorView& out) {
  return call(*state_, kv4::attend, nullptr, args, std::span<const std::int64_t>(), &out, nullptr);
}
Status Cache::attend(std::span<const RowCount> rows, const AttendArgs& args, const MutableTensorView& out) {
  return call(*state_, kv4::attend, &rows, args, std::span<const std::int64_t>(), &out, nullptr);
}
Status Cache::attend_partial(const AttendArgs& args, std::int64_t upto, const PartialState& out) {
  return call(*state_, kv4::attend, nullptr, args, std::span<const std::int64_t>(&upto, 1), nullptr, &out);
}
Status Cache::attend_partial(std::span<const RowCount> rows, const AttendArgs& args, std::span<const std::int64_t> upto,
                             const PartialState& out) {
  return call(*state_, kv4::attend, &rows, args, upto, nullptr, &out);
}
Status Cache::seal() { return call(*state_, kv4::seal); }
Status Cache::crop(std::int64_t length) { return call(*state_, kv4::crop, length); }
Status Cache::crop(int row, std::int64_t length) { return call(*state_, kv4::crop_row, row, length); }
Status Cache::erase(int row, std::int64_t first, std::int64_t count) {
  return call(*state_, kv4::erase, row, first, count);
}
Status Cache::add(int count) { return call(*state_, kv4::add, count); }
Status Cache::remove(std::span<const std::int64_t> rows) { return call(*state_, kv4::remove, rows); }
Status Cache::extend(const Cache& other) {
  return guarded("cache", [&] { return kv4::extend(state_->on_stream(), *other.state_); });
}
Status Cache::select(std::span<const std::int64_t> rows) { return call(*state_, kv4::select, rows); }
Status Cache::repeat(int times) { return call(*state_, kv4::repeat, times); }
Status Cache::reserve(std::int64_t tokens) { return call(*state_, kv4::reserve, tokens); }
Status Cache::advance() { return call(*state_, kv4::advance); }
Status Cache::save(const Sink& sink) const { return call(*state_, kv4::save, sink); }
Status Cache::load(const Source& source) { return call(*state_, kv4::load, source); }
Status Cache::lambda(int row, std::vector<float>* out) const { return call(*state_, kv4::lambda, row, out); }
Status Cache::dense_keys(std::int64_t first, std::int64_t count, const MutableTensorView& out) const {
  return call(*state_, kv4::dense, true, first, count, out);
}
Status Cache::dense_values(std::int64_t first, std::int64_t count, const MutableTensorView& out) const {
  return call(*state_, kv4::dense, false, first, count, out);
}
Status Cache::page_codes(int row, int index, int head, std::span<std::uint8_t> k, std::span<std::uint8_t> v) const {
  return call(*state_, kv4::page_codes, row, index, head, k, v);
}
Status Cache::page_scales(int row, int index, int head, std::span<std::uint16_t> k, std::span<std::uint16_t> v) const {
  return call(*state_, kv4::page_scales, row, index, head, k, v);
}
Status Cache::page_second_rows(int row, int index, int head, SecondRows* out) const {
  return call(*state_, kv4::page_second_rows, row, index, head, out);
}
Status Cache::clone(std::unique_ptr<Cache>* out) const {
  std::unique_ptr<CacheState> copy;
  KV4_RETURN_IF_ERROR(call(*state_, kv4::fork, &copy));
  return guarded("cache", [&] {
    out->reset(new Cache(std::move(copy)));
    return Status();
  });
}

void Cache::set_stream(void* stream) {
  state_->stream = stream;
  state_->on_stream();
}

void Cache::reset() {
  state_->on_stream().sequences.clear();
  ++state_->version;
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
std::int64_t Cache::exact_tokens(int row) const {
  return extent(*state_, row).sinks + extent(*state_, row).window_rows();
}
std::uint64_t Cache::version() const { return state_->version; }
int Cache::page_count(int row) const { return static_cast<int>(extent(*state_, row).pages); }

}  // namespace kv4
