// Every architecture against llama.cpp's library with a float16 cache, on the same file.
#include <gguf.h>

#include <cmath>
#include <functional>
#include <iterator>

#include "peer.h"
#include "tiny_model.h"

namespace kv4::engine {
namespace {

double rms(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += static_cast<double>(v) * v;
  return std::sqrt(sum / static_cast<double>(x.size()));
}

double apart(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

class Architectures : public EngineTest, public ::testing::WithParamInterface<TinyModel> {
 protected:
  // A prompt of several batches, then one token after the other: relative root mean square error of all logits.
  double error_against_llama(const ContextOptions& options, const std::function<void(gguf_context*)>& change = nullptr) {
    TinyModel tiny = GetParam();
    tiny.change = change;
    const std::shared_ptr<const Model> model = load(tiny);
    const std::unique_ptr<Context> own = context(model, options);
    std::shared_ptr<llama_model> peer_model;
    std::unique_ptr<run::Peer> peer;
    EXPECT_TRUE(run::Peer::load(model->path(), &peer_model).ok());
    EXPECT_TRUE(run::Peer::create(peer_model, "f16", 2048, 2, 128, &peer).ok());
    const std::vector<std::int32_t> tokens = some_tokens(340);
    double worst = 0;
    const auto compare = [&](std::size_t first, std::size_t count, std::int64_t answers) {
      const std::span<const std::int32_t> now(tokens.data() + first, count);
      const Status status = own->decode(now, answers);
      EXPECT_TRUE(status.ok()) << status.message();
      EXPECT_TRUE(peer->decode(now, answers).ok());
      worst = std::max(worst, apart(own->logits(), peer->logits()) / rms(peer->logits()));
    };
    compare(0, 300, 200);
    for (std::size_t i = 300; i < tokens.size(); ++i) compare(i, 1, 1);
    EXPECT_EQ(own->length(), 340);
    return worst;
  }
};

// Both hold K and V in float16, whose rounding is 2^-11; llama.cpp rounds queries, weights and sums to it as well, in each
// layer. A layer adds some eight such roundings to what the ones before it left.
double float16_bound(const TinyModel& m) { return static_cast<double>(m.layers) * 8 * std::exp2(-11); }

TEST_P(Architectures, ExactCacheIsLlamasFloat16) { EXPECT_LT(error_against_llama(exact()), float16_bound(GetParam())); }

TEST_P(Architectures, Float16CacheIsLlamas) {
  ContextOptions options = exact();
  options.cache = CacheKind::f16;
  EXPECT_LT(error_against_llama(options), float16_bound(GetParam()));
}

// Lloyd-Max with 16 levels leaves 0.0095 of a Gaussian's power. Keys and values of each layer bring it in, independently, and the
// residual stream only dilutes it.
TEST_P(Architectures, PackedCacheIsNearIt) {
  const double error = error_against_llama(packed());
  EXPECT_GT(error, 1e-4);
  EXPECT_LT(error, std::sqrt(0.0095 * 2 * static_cast<double>(GetParam().layers)));
}

TEST_P(Architectures, QuantisedMatrices) {
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K}) {
    TinyModel m = GetParam();
    m.type = type;
    const std::shared_ptr<const Model> model = load(m);
    ASSERT_NE(model, nullptr);
    EXPECT_GT(model->nbytes(), std::size_t{1} << 19);
    const std::unique_ptr<Context> own = context(model, exact());
    std::shared_ptr<llama_model> peer_model;
    std::unique_ptr<run::Peer> peer;
    ASSERT_TRUE(run::Peer::load(model->path(), &peer_model).ok());
    ASSERT_TRUE(run::Peer::create(peer_model, "f16", 512, 2, 128, &peer).ok());
    const std::vector<std::int32_t> tokens = some_tokens(40);
    ASSERT_TRUE(own->decode(tokens).ok());
    ASSERT_TRUE(peer->decode(tokens).ok());
    // Activations are rounded to 8 bits there, and a float16's difference before may move them by one step of 1/127 of the largest.
    EXPECT_LT(apart(own->logits(), peer->logits()) / rms(peer->logits()), 0.05) << ggml_type_name(type);
  }
}

// Every way in which a file says that positions are scaled, or are not.
TEST_P(Architectures, RopeScalingIsReadAsLlamaReadsIt) {
  const std::string prefix = GetParam().architecture + ".rope.";
  const auto set = [&](gguf_context* g, const char* key, float value) { gguf_set_val_f32(g, (prefix + key).c_str(), value); };
  const auto type = [&](gguf_context* g, const char* kind) { gguf_set_val_str(g, (prefix + "scaling.type").c_str(), kind); };
  const std::function<void(gguf_context*)> changes[] = {
      [&](gguf_context* g) { set(g, "scaling.factor", 4); },
      [&](gguf_context* g) { set(g, "scaling.factor", 4), type(g, "linear"); },
      [&](gguf_context* g) { set(g, "scaling.factor", 4), type(g, "none"); },
      [&](gguf_context* g) { set(g, "scale_linear", 4); },
      [&](gguf_context* g) { set(g, "scale_linear", 2), set(g, "scaling.factor", 4); },
      [&](gguf_context* g) { set(g, "scale_linear", 4), type(g, "none"); },
  };
  for (std::size_t i = 0; i < std::size(changes); ++i)
    EXPECT_LT(error_against_llama(exact(), changes[i]), float16_bound(GetParam())) << "way " << i;
}

INSTANTIATE_TEST_SUITE_P(All, Architectures, ::testing::ValuesIn(tiny_models()),
                         [](const ::testing::TestParamInfo<TinyModel>& info) { return info.param.architecture; });

}  // namespace
}  // namespace kv4::engine
