// Random programs of the public C API. An input is a configuration followed by calls, some with invalid arguments that
// must be refused.
//
// The reference is float64 softmax over the contents that the cache reports (dense_keys, dense_values), read before and
// after a call seals its pages; a query sees page i sealed if the page is due at the query's position (kv4/cache.h).
// Exact rows are compared bit for bit with what was appended, and lengths with a model's.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "input.h"
#include "kv4/kv4.h"

namespace kv4::fuzz {
namespace {

constexpr int kGroup = 2, kMostRows = 4, kPage = 64;
constexpr std::int64_t kMostTokens = 224;
// Relative to the largest output: the bound of the attention kernels.
constexpr double kTolerance = 1e-3;

struct Destroy {
  void operator()(kv4_cache* cache) const { kv4_cache_destroy(cache); }
};
using Handle = std::unique_ptr<kv4_cache, Destroy>;

#define KV4_ACCEPT(call) KV4_EXPECT((call) == KV4_OK, kv4_last_error())
// An error message states what was expected and what was given.
#define KV4_REFUSE(call)                                                                   \
  do {                                                                                     \
    KV4_EXPECT((call) != KV4_OK, "a call that has to be refused");                         \
    KV4_EXPECT(std::strstr(kv4_last_error(), ": expected ") != nullptr, kv4_last_error()); \
    KV4_EXPECT(std::strstr(kv4_last_error(), "; got ") != nullptr, kv4_last_error());      \
  } while (false)

// One sequence: rows as appended, [tokens][kv_heads][dim], or as dequantised from a page that a crop reopened.
struct Row {
  std::vector<float> k, v;
  std::int64_t length = 0;
  bool anchored = true;  // some query saw its first token, so pages start at position 0
};

kv4_tensor tensor(float* data, std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t d) {
  return {data, KV4_F32, {b, h, t, d}, {h * t * d, t * d, d, 1}};
}

kv4_cache_config config_of(Input& in) {
  kv4_cache_config c;
  KV4_ACCEPT(kv4_cache_config_init(&c, sizeof c));
  const int kind = in.below(4);
  if (kind == 1) c.recipe = kv4_recipe_exact();
  if (kind == 2) c.recipe = kv4_recipe_paper();
  if (kind != 1 && kind != 2) {
    constexpr std::int32_t kRotations[] = {KV4_ROTATION_SRFT, KV4_ROTATION_SRHT, KV4_ROTATION_HOUSEHOLDER,
                                           KV4_ROTATION_IDENTITY};
    for (kv4_side_recipe* side : {&c.recipe.key, &c.recipe.value}) {
      side->rotation = kRotations[in.below(4)];
      side->levels = in.below(2);
      side->scale = in.below(2);
      side->group = 32 * in.below(2);
    }
    constexpr std::int32_t kBits[] = {0, 2, 3, 4, 6, 8};
    if (c.recipe.key.levels == KV4_LEVELS_LLOYD_MAX) c.bits_k = kBits[in.below(6)];
    if (c.recipe.value.levels == KV4_LEVELS_LLOYD_MAX) c.bits_v = kBits[in.below(6)];
    if (kind == 3) {
      for (const auto& [side, bits] : {std::pair(&c.recipe.key, &c.bits_k), {&c.recipe.value, &c.bits_v}}) {
        side->levels = KV4_LEVELS_TRELLIS;
        side->scale = KV4_SCALE_LEAST_SQUARES;
        if (*bits > 4) *bits = 0;
      }
    }
    c.recipe.key.mean = in.below(2);
    c.recipe.sinks = in.below(8);
    c.recipe.window = in.below(3) * 32;
    c.refined = in.below(3);
  }
  c.kv_heads = 1 + in.below(2);
  c.head_dim_k = 32 * (1 + in.below(2));
  c.head_dim_v = 32 * (1 + in.below(2));
  return c;
}

// A configuration of arbitrary numbers is refused or makes a cache.
void create_anything(Input& in) {
  kv4_cache_config c = config_of(in);
  std::int32_t* const fields[] = {&c.recipe.key.rotation,
                                  &c.recipe.key.reflectors,
                                  &c.recipe.key.group,
                                  &c.recipe.key.levels,
                                  &c.recipe.key.scale,
                                  &c.recipe.key.lambda,
                                  &c.recipe.value.mean,
                                  &c.recipe.value.lambda,
                                  &c.recipe.seal,
                                  &c.recipe.sinks,
                                  &c.recipe.window,
                                  &c.dtype,
                                  &c.head_dim_k,
                                  &c.head_dim_v,
                                  &c.sliding_window,
                                  &c.bits_k,
                                  &c.bits_v,
                                  &c.refined};
  for (int changes = 1 + in.below(3); changes > 0; --changes)
    *fields[in.below(static_cast<int>(std::size(fields)))] = in.one_in(4) ? in.raw<std::int32_t>() : in.below(8);
  if (in.one_in(4)) c.kv_heads = in.raw<std::int16_t>();
  if (in.one_in(8)) c.size = in.raw<std::uint16_t>() % (sizeof c + 1);
  kv4_cache* cache = nullptr;
  if (kv4_cache_create(&c, &cache) == KV4_OK) {
    KV4_EXPECT(kv4_cache_nbytes(cache) > 0, "a cache has a size");
    kv4_cache_destroy(cache);
  } else {
    KV4_EXPECT(std::strstr(kv4_last_error(), ": expected ") != nullptr, kv4_last_error());
  }
}

class Program {
 public:
  Program(Input& in, const kv4_cache_config& config) : in_(in), config_(config), random_(in.raw<std::uint16_t>()) {
    kv4_cache* cache = nullptr;
    KV4_ACCEPT(kv4_cache_create(&config_, &cache));
    cache_.reset(cache);
  }

  void run() {
    add();
    for (int calls = 0; calls < 16 && !in_.empty(); ++calls) {
      const int call = in_.below(20);
      if (call < 7) step(call < 4);
      else if (call == 7) add();
      else if (call == 8) remove();
      else if (call == 9) select();
      else if (call == 10) crop();
      else if (call == 11) go_on_as_clone();
      else if (call == 12) reload();
      else if (call == 13) seal();
      else if (call == 14) extend();
      else if (call == 15) erase();
      else if (call == 16) refused();
      else if (call == 17) append_non_finite();
      else if (call == 18) repeat();
      else damage();
      check_lengths();
    }
    expect_kept();
  }

 private:
  int batch() const { return static_cast<int>(rows_.size()); }
  bool pages() const { return config_.recipe.seal == KV4_SEAL_PAGE; }
  std::int64_t due(std::int64_t position) const {
    if (!pages()) return 0;
    return std::max<std::int64_t>(0, position - config_.recipe.sinks - config_.recipe.window) / kPage;
  }

  void add() {
    const int count = 1 + in_.below(2);
    if (batch() + count > kMostRows) return;
    KV4_ACCEPT(kv4_cache_add(cache_.get(), count));
    rows_.resize(rows_.size() + static_cast<std::size_t>(count));
  }
  void remove() {
    if (batch() < 2) return;
    const std::int64_t row = in_.below(batch());
    KV4_ACCEPT(kv4_cache_remove(cache_.get(), &row, 1));
    rows_.erase(rows_.begin() + row);
  }
  void select() {
    if (batch() == 0) return;
    std::vector<std::int64_t> rows(static_cast<std::size_t>(1 + in_.below(kMostRows)));
    std::vector<Row> next;
    for (std::int64_t& row : rows) {
      row = in_.below(batch());
      next.push_back(rows_[static_cast<std::size_t>(row)]);
    }
    KV4_ACCEPT(kv4_cache_select(cache_.get(), rows.data(), rows.size()));
    rows_ = std::move(next);
  }
  void repeat() {
    if (batch() == 0 || batch() > 2) return;
    KV4_ACCEPT(kv4_cache_repeat(cache_.get(), 2));
    std::vector<Row> next;
    for (const Row& row : rows_) next.insert(next.end(), 2, row);
    rows_ = std::move(next);
  }
  void extend() {
    if (batch() == 0 || batch() > 2) return;
    const Handle other = clone(cache_.get());
    KV4_ACCEPT(kv4_cache_extend(cache_.get(), in_.below(2) == 0 ? other.get() : cache_.get()));
    const std::vector<Row> same = rows_;
    rows_.insert(rows_.end(), same.begin(), same.end());
  }
  void crop() {
    if (batch() == 0) return;
    const int row = in_.below(batch());
    Row& r = rows_[static_cast<std::size_t>(row)];
    const std::int64_t n = std::max<std::int64_t>(0, r.length - (in_.below(2) == 0 ? in_.below(8) : in_.below(256)));
    KV4_ACCEPT(kv4_cache_crop_row(cache_.get(), row, n));
    r.length = n;
    if (n == 0) r.anchored = false;
    adopt(row);
  }
  void erase() {
    if (batch() == 0) return;
    const int row = in_.below(batch());
    Row& r = rows_[static_cast<std::size_t>(row)];
    const std::int64_t first = std::max<std::int64_t>(0, r.length - 1 - in_.below(16)), count = in_.below(4);
    if (kv4_cache_erase(cache_.get(), row, first, count) != KV4_OK) return;  // some positions are sealed
    r.length -= count;
    if (r.length == 0) r.anchored = false;
    adopt(row);
  }
  void seal() { KV4_ACCEPT(kv4_cache_seal(cache_.get())); }
  void go_on_as_clone() {
    expect_kept();
    Handle copy = clone(cache_.get());
    if (in_.below(2) == 0) std::swap(copy, cache_);
    kept_ = std::move(copy);  // shares pages and rows with the cache that goes on
    kept_bytes_ = saved(kept_.get()).bytes;
  }
  void expect_kept() const {
    KV4_EXPECT(!kept_ || saved(kept_.get()).bytes == kept_bytes_, "calls on a cache leave its clone as it was");
  }

  // A file in memory.
  struct File {
    std::vector<std::uint8_t> bytes;
    std::size_t at = 0;
  };
  static kv4_status write(void* context, const void* data, std::size_t bytes) {
    auto* file = static_cast<File*>(context);
    const auto* from = static_cast<const std::uint8_t*>(data);
    file->bytes.insert(file->bytes.end(), from, from + bytes);
    return KV4_OK;
  }
  static kv4_status read(void* context, void* data, std::size_t bytes) {
    auto* file = static_cast<File*>(context);
    if (bytes > file->bytes.size() - file->at) return KV4_DATA_LOSS;
    std::memcpy(data, file->bytes.data() + file->at, bytes);
    file->at += bytes;
    return KV4_OK;
  }
  static File saved(const kv4_cache* cache) {
    File file;
    KV4_ACCEPT(kv4_cache_save(cache, write, &file));
    return file;
  }
  Handle empty() const {
    kv4_cache* fresh = nullptr;
    KV4_ACCEPT(kv4_cache_create(&config_, &fresh));
    return Handle(fresh);
  }
  void reload() {
    File file = saved(cache_.get());
    Handle fresh = empty();
    KV4_ACCEPT(kv4_cache_load(fresh.get(), read, &file));
    KV4_EXPECT(file.at == file.bytes.size(), "load reads what save wrote");
    cache_ = std::move(fresh);
    KV4_EXPECT(saved(cache_.get()).bytes == file.bytes, "what is loaded saves to the same");
  }
  void damage() {
    File file = saved(cache_.get());
    file.bytes[in_.raw<std::uint32_t>() % file.bytes.size()] ^= static_cast<std::uint8_t>(1 + in_.below(255));
    const Handle fresh = empty();
    KV4_REFUSE(kv4_cache_load(fresh.get(), read, &file));
    KV4_EXPECT(kv4_cache_batch(fresh.get()) == 0, "a refused file leaves no trace");
  }

  static Handle clone(const kv4_cache* cache) {
    kv4_cache* copy = nullptr;
    KV4_ACCEPT(kv4_cache_clone(cache, &copy));
    return Handle(copy);
  }

  // One sequence's keys or values, [tokens][kv_heads][dim]; `sealed`: after sealing what is due.
  std::vector<float> dense(int row, bool keys, bool sealed) const {
    const std::int64_t n = rows_[static_cast<std::size_t>(row)].length, h = config_.kv_heads,
                       d = keys ? config_.head_dim_k : config_.head_dim_v;
    const Handle copy = clone(cache_.get());
    const std::int64_t only = row;
    KV4_ACCEPT(kv4_cache_select(copy.get(), &only, 1));
    if (sealed) KV4_ACCEPT(kv4_cache_seal(copy.get()));
    std::vector<float> x(static_cast<std::size_t>(h * n * d));
    if (n == 0) return x;
    const kv4_tensor out = {x.data(), KV4_F32, {1, h, n, d}, {0, d, h * d, 1}};
    KV4_ACCEPT(keys ? kv4_cache_dense_keys(copy.get(), 0, n, &out) : kv4_cache_dense_values(copy.get(), 0, n, &out));
    return x;
  }
  void adopt(int row) {
    Row& r = rows_[static_cast<std::size_t>(row)];
    r.k = dense(row, true, false);
    r.v = dense(row, false, false);
  }

  struct Call {
    std::vector<kv4_row_count> counts;
    std::int64_t total = 0;
  };
  Call some_rows() {
    constexpr int kSizes[] = {1, 1, 1, 1, 1, 2, 7, 30, 63, 64, 65, 130};
    Call call;
    for (int b = 0; b < batch(); ++b) {
      const std::int64_t n = kSizes[in_.below(12)];
      if (in_.one_in(4) || rows_[static_cast<std::size_t>(b)].length + n > kMostTokens) continue;
      call.counts.push_back({b, n});
      call.total += n;
    }
    return call;
  }

  // Appends tokens to some sequences, then attends. plain: causal, without further masks.
  void step(bool plain) {
    const Call call = some_rows();
    if (call.counts.empty()) return;
    const std::int64_t h = config_.kv_heads, dk = config_.head_dim_k, dv = config_.head_dim_v, t = call.total;
    std::vector<float> k = values(h * t * dk), v = values(h * t * dv);
    const kv4_tensor kt = tensor(k.data(), 1, h, t, dk), vt = tensor(v.data(), 1, h, t, dv);
    KV4_ACCEPT(kv4_cache_append_rows(cache_.get(), call.counts.data(), call.counts.size(), &kt, &vt));
    std::int64_t begin = 0;
    for (const kv4_row_count& each : call.counts) {
      Row& r = rows_[static_cast<std::size_t>(each.row)];
      plain |= !r.anchored || r.length == 0;
      r.anchored = true;
      for (std::int64_t i = 0; i < each.tokens; ++i)
        for (std::int64_t head = 0; head < h; ++head) {
          const auto from = [&](const std::vector<float>& x, std::int64_t d) {
            return x.begin() + (head * t + begin + i) * d;
          };
          r.k.insert(r.k.end(), from(k, dk), from(k, dk) + dk);
          r.v.insert(r.v.end(), from(v, dv), from(v, dv) + dv);
        }
      r.length += each.tokens;
      begin += each.tokens;
    }
    attend(call, plain);
  }

  void attend(const Call& call, bool plain) {
    const std::int64_t heads = config_.kv_heads * kGroup, dk = config_.head_dim_k, dv = config_.head_dim_v;
    std::vector<float> q = values(heads * call.total * dk);
    std::vector<float> out(static_cast<std::size_t>(heads * call.total * dv), -77.0f), sinks = values(heads);
    kv4_attend_args args;
    KV4_ACCEPT(kv4_attend_args_init(&args, sizeof args));
    args.q = tensor(q.data(), 1, heads, call.total, dk);
    std::vector<std::int32_t> windows;
    if (!plain) {
      if (in_.below(2) == 0) args.softcap = 5.0f;
      if (in_.below(2) == 0) args.sinks = sinks.data();
      if (in_.below(2) == 0) {
        for (std::size_t i = 0; i < call.counts.size(); ++i) windows.push_back(in_.below(100));
        args.window = windows.data();
      }
    }
    std::vector<std::vector<float>> held;  // per sequence: keys and values before and after sealing
    for (const kv4_row_count& each : call.counts)
      for (const bool keys : {true, false}) held.push_back(dense(static_cast<int>(each.row), keys, false));
    const kv4_tensor to = tensor(out.data(), 1, heads, call.total, dv);
    KV4_ACCEPT(kv4_cache_attend_rows(cache_.get(), call.counts.data(), call.counts.size(), &args, &to));
    if (in_.one_in(4)) expect_partial(call, args, out);
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < call.counts.size(); begin += call.counts[i++].tokens) {
      const int row = static_cast<int>(call.counts[i].row);
      const std::vector<float> k = dense(row, true, true), v = dense(row, false, true);
      expect_rows(row, held[2 * i], held[2 * i + 1]);
      const std::int64_t n = call.counts[i].tokens;
      for (std::int64_t t = n - 1; t >= 0; t -= std::max<std::int64_t>(1, n / 3)) {
        const std::int64_t position = rows_[static_cast<std::size_t>(row)].length - n + t;
        const std::int64_t sealed = n <= kPage ? config_.recipe.sinks + due(position) * kPage : 0;
        expect_output(args, begin + t, position, windows.empty() ? 0 : windows[i], {held[2 * i], k, held[2 * i + 1], v},
                      sealed, out, call.total);
      }
    }
  }

  struct Held {
    const std::vector<float>&k_before, &k_after, &v_before, &v_after;
  };
  // One query's outputs. Tokens between the sinks and `sealed` are read as sealed.
  void expect_output(const kv4_attend_args& args, std::int64_t query, std::int64_t position, std::int64_t window,
                     const Held& held, std::int64_t sealed, const std::vector<float>& out, std::int64_t total) const {
    const std::int64_t h = config_.kv_heads, dk = config_.head_dim_k, dv = config_.head_dim_v;
    const auto* q = static_cast<const float*>(args.q.data);
    for (std::int64_t head = 0; head < h * kGroup; ++head) {
      const std::int64_t first = window > 0 ? std::max<std::int64_t>(0, position - window + 1) : 0;
      std::vector<double> scores;
      double top = args.sinks != nullptr ? args.sinks[head] : -std::numeric_limits<double>::infinity();
      const auto row_of = [&](const std::vector<float>& before, const std::vector<float>& after, std::int64_t j,
                              std::int64_t d) {
        const bool packed = j >= config_.recipe.sinks && j < sealed;
        return (packed ? after : before).data() + (j * h + head / kGroup) * d;
      };
      for (std::int64_t j = first; j <= position; ++j) {
        const float* k = row_of(held.k_before, held.k_after, j, dk);
        double s = 0;
        for (std::int64_t c = 0; c < dk; ++c) s += static_cast<double>(q[(head * total + query) * dk + c]) * k[c];
        s /= std::sqrt(static_cast<double>(dk));
        if (args.softcap > 0) s = args.softcap * std::tanh(s / args.softcap);
        scores.push_back(s);
        top = std::max(top, s);
      }
      double sum = args.sinks != nullptr ? std::exp(args.sinks[head] - top) : 0;
      std::vector<double> want(static_cast<std::size_t>(dv), 0.0);
      for (std::size_t i = 0; i < scores.size(); ++i) {
        const double p = std::exp(scores[i] - top);
        const float* v = row_of(held.v_before, held.v_after, first + static_cast<std::int64_t>(i), dv);
        sum += p;
        for (std::int64_t c = 0; c < dv; ++c) want[static_cast<std::size_t>(c)] += p * v[c];
      }
      double largest = 1e-6;
      for (double& x : want) largest = std::max(largest, std::abs(x /= sum));
      for (std::int64_t c = 0; c < dv; ++c) {
        const double got = out[static_cast<std::size_t>((head * total + query) * dv + c)];
        if (!(std::abs(got - want[static_cast<std::size_t>(c)]) <= kTolerance * largest))
          std::fprintf(stderr, "position %ld, head %ld, channel %ld: expected %g; got %g\n",
                       static_cast<long>(position), static_cast<long>(head), static_cast<long>(c),
                       want[static_cast<std::size_t>(c)], got);
        KV4_EXPECT(std::abs(got - want[static_cast<std::size_t>(c)]) <= kTolerance * largest,
                   "attention is softmax over what is held");
      }
    }
  }

  // Tokens sealed on arrival differ from what was appended by at most half a step in each rotated channel: 1/14 of the
  // largest channel, which the norm bounds. 1 % allows for the scale's rounding. Unrelated tokens differ by more than
  // either's norm.
  static void expect_packed(const std::vector<float>& held, const std::vector<float>& appended, std::int64_t d) {
    for (std::size_t at = 0; at < appended.size(); at += static_cast<std::size_t>(d)) {
      double error = 0, square = 0;
      for (std::size_t i = at; i < at + static_cast<std::size_t>(d); ++i) {
        error += std::pow(static_cast<double>(held[i]) - appended[i], 2);
        square += std::pow(appended[i], 2);
      }
      KV4_EXPECT(error <= static_cast<double>(d) / 196 * 1.01 * square, "packed tokens are what was appended");
    }
  }

  // Sinks and tokens not yet due for sealing equal what was appended; packed tokens are close to it.
  void expect_rows(int row, const std::vector<float>& k, const std::vector<float>& v) const {
    const Row& r = rows_[static_cast<std::size_t>(row)];
    if (config_.recipe.seal == KV4_SEAL_ARRIVAL) {
      expect_packed(k, r.k, config_.head_dim_k);
      expect_packed(v, r.v, config_.head_dim_v);
      return;
    }
    const std::int64_t h = config_.kv_heads, end = config_.recipe.sinks + due(r.length) * kPage;
    for (std::int64_t j = 0; j < r.length; ++j) {
      if (pages() && j >= config_.recipe.sinks && j < end) continue;
      const auto same = [&](const std::vector<float>& a, const std::vector<float>& b, std::int64_t d) {
        return std::equal(a.begin() + j * h * d, a.begin() + (j + 1) * h * d, b.begin() + j * h * d);
      };
      KV4_EXPECT(same(k, r.k, config_.head_dim_k) && same(v, r.v, config_.head_dim_v), "exact rows are exact");
    }
  }

  // The partial state over all tokens, normalised, equals attend's output.
  void expect_partial(const Call& call, const kv4_attend_args& args, const std::vector<float>& out) {
    const std::int64_t heads = config_.kv_heads * kGroup, dv = config_.head_dim_v, rows = heads * call.total;
    std::vector<float> o(static_cast<std::size_t>(rows * dv)), m(static_cast<std::size_t>(rows)), l(m);
    std::vector<std::int64_t> upto;
    for (const kv4_row_count& each : call.counts) upto.push_back(rows_[static_cast<std::size_t>(each.row)].length);
    KV4_ACCEPT(kv4_cache_attend_partial_rows(cache_.get(), call.counts.data(), call.counts.size(), &args, upto.data(),
                                             o.data(), m.data(), l.data()));
    std::vector<float> eo(o.size(), 0.0f), em(m.size(), -std::numeric_limits<float>::infinity()), el(l.size(), 0.0f);
    KV4_ACCEPT(
        kv4_merge(eo.data(), em.data(), el.data(), o.data(), m.data(), l.data(), rows, static_cast<std::int32_t>(dv)));
    std::vector<float> finished(out.size(), -7.0f);
    const kv4_tensor to = tensor(finished.data(), 1, heads, call.total, dv);
    KV4_ACCEPT(kv4_finish(eo.data(), em.data(), el.data(), args.sinks, &to));
    float largest = 1e-6f;
    for (const float x : out) largest = std::max(largest, std::abs(x));
    for (std::size_t i = 0; i < out.size(); ++i)
      KV4_EXPECT(std::abs(finished[i] - out[i]) <= static_cast<float>(kTolerance) * largest,
                 "a partial state over all tokens, finished, is attention");
  }

  // NaN is stored as zeros, reported by the first query that sees it, and forgotten when its token is cropped.
  void append_non_finite() {
    if (batch() == 0) return;
    const int row = in_.below(batch());
    Row& r = rows_[static_cast<std::size_t>(row)];
    if (r.length == 0 || !r.anchored || r.length >= kMostTokens) return;
    const std::int64_t h = config_.kv_heads, dk = config_.head_dim_k, dv = config_.head_dim_v;
    std::vector<float> k = values(h * dk), v = values(h * dv), q = values(h * kGroup * dk);
    (in_.below(2) == 0 ? k : v)[static_cast<std::size_t>(in_.below(32))] =
        in_.below(2) == 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    const kv4_row_count one{row, 1};
    const kv4_tensor kt = tensor(k.data(), 1, h, 1, dk), vt = tensor(v.data(), 1, h, 1, dv);
    KV4_ACCEPT(kv4_cache_append_rows(cache_.get(), &one, 1, &kt, &vt));
    std::vector<float> out(static_cast<std::size_t>(h * kGroup * dv));
    kv4_attend_args args;
    KV4_ACCEPT(kv4_attend_args_init(&args, sizeof args));
    args.q = tensor(q.data(), 1, h * kGroup, 1, dk);
    const kv4_tensor to = tensor(out.data(), 1, h * kGroup, 1, dv);
    KV4_EXPECT(kv4_cache_attend_rows(cache_.get(), &one, 1, &args, &to) == KV4_NON_FINITE, "NaN is refused");
    KV4_ACCEPT(kv4_cache_crop_row(cache_.get(), row, r.length));
  }

  // Calls with invalid arguments change nothing.
  void refused() {
    const File before = saved(cache_.get());
    const std::int64_t h = config_.kv_heads, dk = config_.head_dim_k, dv = config_.head_dim_v;
    std::vector<float> x(static_cast<std::size_t>(4 * h * (dk + dv)), 1.0f);
    kv4_tensor k = tensor(x.data(), 1, h, 2, dk), v = tensor(x.data(), 1, h, 2, dv);
    const std::int64_t any = in_.raw<std::int64_t>();
    switch (in_.below(8)) {
      case 0: {
        const std::int64_t row = any >= 0 && any < batch() ? batch() : any;
        const kv4_row_count one{row, 2};
        KV4_REFUSE(kv4_cache_append_rows(cache_.get(), &one, 1, &k, &v));
        KV4_REFUSE(kv4_cache_remove(cache_.get(), &row, 1));
        KV4_REFUSE(kv4_cache_select(cache_.get(), &row, 1));
        break;
      }
      case 1:
        k.shape[in_.below(4)] = any;
        if (k.shape[0] != 1 || k.shape[1] != h || k.shape[2] != 2 || k.shape[3] != dk) {
          const kv4_row_count one{0, 2};
          KV4_REFUSE(kv4_cache_append_rows(cache_.get(), &one, 1, &k, &v));
        }
        break;
      case 2: KV4_REFUSE(kv4_cache_append(cache_.get(), nullptr, &v)); break;
      case 3: KV4_REFUSE(kv4_cache_crop_row(cache_.get(), in_.below(2) == 0 ? -1 : batch(), 0)); break;
      case 4: KV4_REFUSE(kv4_cache_dense_keys(cache_.get(), any, kv4_cache_length(cache_.get()) + 1, &k)); break;
      case 5: KV4_REFUSE(kv4_cache_repeat(cache_.get(), -1)); break;
      case 6: KV4_REFUSE(kv4_cache_add(cache_.get(), -1)); break;
      default: {
        kv4_attend_args args;
        KV4_ACCEPT(kv4_attend_args_init(&args, sizeof args));
        args.q = tensor(x.data(), 1, h, 1, dk);
        args.q.dtype = 3 + in_.below(200);
        KV4_REFUSE(kv4_cache_attend(cache_.get(), &args, &v));
      }
    }
    KV4_EXPECT(saved(cache_.get()).bytes == before.bytes, "a refused call leaves no trace");
  }

  void check_lengths() const {
    KV4_EXPECT(kv4_cache_batch(cache_.get()) == batch(), "sequences");
    std::int64_t longest = 0;
    for (int b = 0; b < batch(); ++b) {
      std::int64_t length = -1;
      KV4_ACCEPT(kv4_cache_row_length(cache_.get(), b, &length));
      KV4_EXPECT(length == rows_[static_cast<std::size_t>(b)].length, "a sequence's length");
      longest = std::max(longest, length);
    }
    KV4_EXPECT(kv4_cache_length(cache_.get()) == longest, "the longest length");
    KV4_EXPECT(kv4_cache_nbytes(cache_.get()) > 0, "a cache has a size");
  }

  std::vector<float> values(std::int64_t n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& each : x) each = static_cast<float>(random_.normal());
    return x;
  }

  Input& in_;
  kv4_cache_config config_;
  cases::Random random_;
  Handle cache_, kept_;
  std::vector<std::uint8_t> kept_bytes_;
  std::vector<Row> rows_;
};

}  // namespace
}  // namespace kv4::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  KV4_EXPECT(kv4_set_num_threads(1) == KV4_OK, "one thread");
  KV4_EXPECT(kv4_set_operand_bits(16) == KV4_OK, "as close to the reference as it can be");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kv4::fuzz;
  Input in(data, size);
  const int kind = in.below(8);
  KV4_EXPECT(kv4_force_isa(kind == 1 ? "portable" : "") == KV4_OK, kv4_last_error());
  if (kind == 0) {
    create_anything(in);
    return 0;
  }
  const kv4_cache_config config = config_of(in);
  Program(in, config).run();
  return 0;
}
