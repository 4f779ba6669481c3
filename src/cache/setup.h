// The immutable configuration of one layer's caches, shared by clones.
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
  // The most exact rows that token-by-token decoding holds, plus one: the token whose call releases a page's rows is
  // stored after them. Unbounded where nothing is sealed or evicted.
  std::int64_t most_rows(const ledger::Extent& x) const {
    if (policy.seals()) return policy.window + kPageTokens + (x.anchored ? 0 : policy.sinks) + 1;
    return policy.sliding_window > 0 ? policy.sliding_window + kPageTokens : std::numeric_limits<std::int64_t>::max();
  }
};

}  // namespace kv4
