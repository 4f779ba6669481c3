// kv4 from C++: two sequences of their own length in one cache, decoded together.
//
//   c++ -std=c++20 attend.cpp $(pkg-config --cflags --libs kv4) -o attend
#include <kv4/cache.h>

#include <cstdlib>
#include <iostream>
#include <vector>

namespace {

constexpr std::int64_t kKvHeads = 2, kHeads = 8, kDim = 64;

void check(const kv4::Status& status) {
  if (status.ok()) return;
  std::cerr << status.message() << "\n";
  std::exit(1);
}

// [1, heads, tokens, kDim]: rows of several sequences one after another on the axis of tokens.
struct Rows {
  Rows(std::int64_t heads, std::int64_t tokens) : heads(heads), tokens(tokens), values(heads * tokens * kDim) {
    for (float& x : values) x = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f;
  }
  kv4::TensorView view() const {
    return {values.data(), kv4::DType::f32, {1, heads, tokens, kDim}, {0, tokens * kDim, kDim, 1}};
  }
  std::int64_t heads, tokens;
  std::vector<float> values;
};

}  // namespace

int main() {
  kv4::CacheConfig config;
  config.kv_heads = kKvHeads;
  config.head_dim_k = config.head_dim_v = kDim;
  std::unique_ptr<kv4::Cache> cache;
  check(kv4::Cache::create(config, &cache));
  check(cache->add(2));

  // Prompts of 300 and 40 tokens, then a token each.
  for (const std::vector<kv4::RowCount>& counts :
       {std::vector<kv4::RowCount>{{0, 300}, {1, 40}}, std::vector<kv4::RowCount>{{0, 1}, {1, 1}}}) {
    const std::int64_t tokens = counts[0].tokens + counts[1].tokens;
    const Rows k(kKvHeads, tokens), v(kKvHeads, tokens), q(kHeads, tokens);
    check(cache->append(counts, k.view(), v.view()));
    std::vector<float> out(q.values.size());
    kv4::AttendArgs args;
    args.q = q.view();
    check(cache->attend(counts, args, {out.data(), kv4::DType::f32, args.q.shape, args.q.stride}));
  }
  check(cache->seal());
  std::cout << "sequences of " << cache->length(0) << " and " << cache->length(1) << " tokens, "
            << cache->sealed_tokens(0) << " and " << cache->sealed_tokens(1) << " of them in 4 bits, "
            << cache->nbytes() << " bytes\n";
  return 0;
}
