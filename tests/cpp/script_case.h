// Scripts of calls, run on two caches: an undisturbed one, and one with failures or refused calls in between.
#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "save_case.h"

namespace kv4::scripts {

using Output = std::vector<float>;

// Running it allocates nothing outside the library.
struct Call {
  std::string name;
  std::function<Status(Cache&, Output*)> run;
  std::size_t outputs = 0;  // number of floats written
};

// Generates scripts; random arguments are drawn at generation, so that a call does the same to every cache.
class Writer {
 public:
  Writer(const saved::Case& c, std::uint64_t seed) : case_(c), starts_(c.starts), random_(seed) {}

  void append(std::int64_t tokens) {
    const auto k = std::make_shared<std::vector<std::byte>>(rows(tokens, case_.config.head_dim_k));
    const auto v = std::make_shared<std::vector<std::byte>>(rows(tokens, case_.config.head_dim_v));
    const std::int64_t b = batch(), h = case_.config.kv_heads, dk = case_.config.head_dim_k,
                       dv = case_.config.head_dim_v;
    const DType dtype = case_.config.dtype;
    add("append " + std::to_string(tokens), [=](Cache& c, Output*) {
      return c.append({k->data(), dtype, {b, h, tokens, dk}, {h * tokens * dk, tokens * dk, dk, 1}},
                      {v->data(), dtype, {b, h, tokens, dv}, {h * tokens * dv, tokens * dv, dv, 1}});
    });
    length_ += tokens;
  }
  // The newest `tokens` queries; `general`: padding is hidden by a general mask.
  void attend(std::int64_t tokens, bool general = false) {
    const std::int64_t b = batch(), h = std::int64_t{case_.config.kv_heads} * case_.group, dk = case_.config.head_dim_k,
                       dv = case_.config.head_dim_v;
    const auto q = std::make_shared<std::vector<float>>(
        cases::normal_rows(b * h * tokens, static_cast<int>(dk), random_.bits(), 0.3));
    const auto start = std::make_shared<std::vector<std::int32_t>>(starts_);
    const std::int64_t length = length_;
    const auto mask = std::make_shared<std::vector<std::uint8_t>>();
    for (const std::int32_t first : starts_)
      for (std::int64_t j = 0; j < length; ++j) mask->push_back(j >= first);
    add("attend " + std::to_string(tokens), [=](Cache& c, Output* out) {
      AttendArgs args;
      args.q = {q->data(), DType::f32, {b, h, tokens, dk}, {h * tokens * dk, tokens * dk, dk, 1}};
      if (general) {
        args.mask.kind = Mask::General::boolean;
        args.mask.general = mask->data();
        args.mask.general_stride = {length, 0, 0, 1};
        args.mask.columns = length;
      } else {
        args.mask.start = start->data();
      }
      return c.attend(args, {out->data(), DType::f32, {b, h, tokens, dv}, {h * tokens * dv, tokens * dv, dv, 1}});
    });
    calls_.back().outputs = static_cast<std::size_t>(b * h * tokens * dv);
  }
  void crop(std::int64_t length) {
    length_ = length;
    add("crop " + std::to_string(length), [=](Cache& c, Output*) { return c.crop(length); });
  }
  void select(const std::vector<std::int64_t>& rows) {
    std::vector<std::int32_t> next;
    for (const std::int64_t row : rows) next.push_back(starts_[static_cast<std::size_t>(row)]);
    starts_ = next;
    add("select", [=](Cache& c, Output*) { return c.select(rows); });
  }
  void seal() {
    add("seal", [](Cache& c, Output*) { return c.seal(); });
  }
  void reserve(std::int64_t tokens) {
    add("reserve", [=](Cache& c, Output*) { return c.reserve(tokens); });
  }
  // A clone that is used, then destroyed.
  void fork() {
    add("fork", [](Cache& c, Output*) {
      std::unique_ptr<Cache> copy;
      KV4_RETURN_IF_ERROR(c.clone(&copy));
      return copy->seal();
    });
  }

  std::int64_t batch() const { return static_cast<std::int64_t>(starts_.size()); }
  std::int64_t length() const { return length_; }
  std::vector<Call> take() { return std::move(calls_); }

 private:
  void add(std::string name, std::function<Status(Cache&, Output*)> run) {
    calls_.push_back({std::move(name) + " at call " + std::to_string(calls_.size()), std::move(run)});
  }
  // [batch, kv_heads, tokens, dim] in the cache's dtype; NaN in padding.
  std::vector<std::byte> rows(std::int64_t tokens, int dim) {
    std::vector<std::byte> bytes;
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (int h = 0; h < case_.config.kv_heads; ++h) {
        std::vector<float> x = cases::normal_rows(tokens, dim, random_.bits(), 0.5);
        for (std::int64_t t = length_;
             t < std::min<std::int64_t>(length_ + tokens, starts_[static_cast<std::size_t>(b)]); ++t)
          x[static_cast<std::size_t>((t - length_) * dim)] = std::numeric_limits<float>::quiet_NaN();
        for (const float value : x) put(value, &bytes);
      }
    }
    return bytes;
  }
  void put(float x, std::vector<std::byte>* to) const {
    const std::uint16_t half = case_.config.dtype == DType::f16 ? f32_to_f16(x) : f32_to_bf16(x);
    const auto* bytes = case_.config.dtype == DType::f32 ? reinterpret_cast<const std::byte*>(&x)
                                                         : reinterpret_cast<const std::byte*>(&half);
    to->insert(to->end(), bytes, bytes + size_of(case_.config.dtype));
  }

  saved::Case case_;
  std::vector<std::int32_t> starts_;
  cases::Random random_;
  std::int64_t length_ = 0;
  std::vector<Call> calls_;
};

// Short texts, the first page and later ones, by single tokens, drafts and prefills; crops into the last call, into
// pages and to 0; forks.
inline std::vector<Call> script(const saved::Case& c) {
  Writer w(c, 5);
  const auto step = [&](std::int64_t tokens, bool general = false) {
    w.append(tokens);
    w.attend(tokens, general);
  };
  step(20);
  for (int i = 0; i < 3; ++i) step(1);
  step(40, true);
  w.crop(w.length() - 3);
  step(64);  // makes the first page due, unless there is padding
  step(9);
  w.crop(w.length() - 8);
  for (int i = 0; i < 4; ++i) step(1);
  w.reserve(3);
  w.fork();
  w.select({1, 0, 1});
  step(64, true);
  w.crop(w.length() - 30);
  step(1);
  step(130, true);
  w.seal();
  step(2);
  if (c.config.sliding_window == 0) {
    w.crop(75);
    step(5);
    w.crop(8);
    step(70);
    w.crop(0);
    step(3);
  }
  return w.take();
}

inline std::vector<saved::Case> script_cases(const std::string& backend) {
  using saved::config_of;
  using sessions::with;
  std::vector<saved::Case> list = {
      {"default", config_of(Recipe(), 2, 64, 64), 2, {0, 7}},
      {"two head dims", config_of(Recipe(), 1, 64, 32, DType::bf16), 2, {0, 7}},
      {"no sinks, no window", config_of(with(0, 0), 2, 32, 32, DType::f16), 1, {0, 7}},
      {"exact", config_of(Recipe::exact(), 2, 32, 32), 2, {0, 7}},
      {"arrival", config_of(Recipe::paper(), 2, 32, 32), 2, {0, 7}},
      {"sliding window", config_of(with(4, 64), 2, 32, 32, DType::f32, 70), 2, {0, 7}},
      {"sliding window, exact", config_of(Recipe::exact(), 2, 32, 32, DType::f32, 40), 2, {0, 7}},
      {"sliding window, arrival", config_of(Recipe::paper(), 2, 32, 32, DType::f32, 40), 2, {0, 7}}};
  if (backend == "cpu") list.push_back({"a trellis", config_of(Recipe::trellis(), 2, 64, 32), 2, {0, 7}});
  for (saved::Case& c : list) c.config.backend = backend;
  return list;
}

}  // namespace kv4::scripts
