// What one layer's caches are made from and never change: clones have it in common.
#pragma once

#include <limits>
#include <memory>

#include "cache/block.h"
#include "cache/rows.h"
#include "kv4/cache.h"
#include "ledger/ledger.h"

namespace kv4 {

struct Setup {
  CacheConfig config;
  ledger::Policy policy;
  Backend* backend = nullptr;
  RowShape shape;
  PageSpec spec;                            // valid unless the recipe never seals
  std::shared_ptr<Block> given_k, given_v;  // lambda of the configuration; null where it has none

  static Status make(const CacheConfig& config, std::shared_ptr<const Setup>* out);

  bool seals() const { return policy.seal != SealMode::never; }
  int heads() const { return config.kv_heads; }
  std::size_t channels() const {
    return static_cast<std::size_t>(config.kv_heads) * static_cast<std::size_t>(config.head_dim_k);
  }
  const float* lambda_v() const { return given_v == nullptr ? nullptr : given_v->as<float>(); }
  const float* lambda_k(const std::shared_ptr<Block>& learnt) const {
    const std::shared_ptr<Block>& values = given_k ? given_k : learnt;
    return values == nullptr ? nullptr : values->as<float>();
  }
  // Exact rows that decoding one by one holds at most, and one more: the token whose call lets go of a page's rows lies
  // behind them. Without end where nothing is sealed or evicted.
  std::int64_t most_rows(const ledger::Extent& x) const {
    if (policy.seals()) return policy.window + kPageTokens + (x.anchored ? 0 : policy.sinks) + 1;
    return policy.sliding_window > 0 ? policy.sliding_window + kPageTokens : std::numeric_limits<std::int64_t>::max();
  }
};

}  // namespace kv4
