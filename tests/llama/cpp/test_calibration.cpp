// Reading lambda from a file, and refusing bad files.
#include "calibration.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "cache_tensors.h"

namespace kv4::llama {
namespace {

class CalibrationTest : public SettingsTest {
 protected:
  void SetUp() override {
    SettingsTest::SetUp();
    path_ = (std::filesystem::temp_directory_path() / ("kv4-calibration-" + std::to_string(getpid()))).string();
  }
  void TearDown() override {
    std::filesystem::remove(path_);
    SettingsTest::TearDown();
  }
  // A safetensors file of this header, and of these numbers.
  void write(const std::string& header, const std::vector<float>& numbers) const {
    std::ofstream file(path_, std::ios::binary);
    const std::uint64_t size = header.size();
    file.write(reinterpret_cast<const char*>(&size), sizeof size);
    file << header;
    file.write(reinterpret_cast<const char*>(numbers.data()),
               static_cast<std::streamsize>(numbers.size() * sizeof(float)));
  }
  static std::string with_meta(const std::string& entries) {
    return R"({"__metadata__":{"format":"kv4-calibration","version":"1","recipe":"{\"a\": 1}"})" + entries + "}";
  }
  std::string refusal() const {
    Calibration read;
    const Status status = Calibration::read(path_, &read);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
    return status.message();
  }

  std::string path_;
};

constexpr const char* kOne = R"(,"layer.2.key.lambda":{"dtype":"F32","shape":[1,4],"data_offsets":[0,16]})";

TEST_F(CalibrationTest, EachLayerHasItsOwn) {
  write(
      with_meta(std::string(kOne) + R"(,"layer.11.value.lambda":{"dtype":"F32","shape":[2,2],"data_offsets":[16,32]},)"
                                    R"("layer.2.query.moments":{})"),
      {1, 2, 3, 4, 5, 6, 7, 8});
  Calibration read;
  const Status status = Calibration::read(path_, &read);
  ASSERT_TRUE(status.ok()) << status.message();
  std::vector<float> lambda;
  ASSERT_TRUE(read.keys_of(2, 1, 4, &lambda).ok());
  EXPECT_EQ(lambda, (std::vector<float>{1, 2, 3, 4}));
  EXPECT_TRUE(read.has_values());
  ASSERT_TRUE(read.values_of(11, 2, 2, &lambda).ok());
  EXPECT_EQ(lambda, (std::vector<float>{5, 6, 7, 8}));
  EXPECT_EQ(read.keys_of(3, 1, 4, &lambda).message(),
            "KV4_CALIBRATION: expected this model's lambda of keys, [1, 4] for this layer; got none");
  EXPECT_EQ(read.keys_of(2, 2, 4, &lambda).message(),
            "KV4_CALIBRATION: expected this model's lambda of keys, [2, 4] for this layer; got [1, 4]");
}

TEST_F(CalibrationTest, WhatIsNoneIsRefused) {
  EXPECT_EQ(refusal(), "KV4_CALIBRATION: expected a file that can be read; got " + path_);
  std::ofstream(path_) << "a letter";
  EXPECT_EQ(refusal(), "KV4_CALIBRATION: expected a safetensors file; got " + path_);
  write("{}", {});
  EXPECT_EQ(
      refusal(),
      "KV4_CALIBRATION: expected version 1 of kv4-calibration, as `kv4 calibrate` writes it; got none, version none");
  write(R"({"__metadata__":{"format":"kv4-calibration","version":"2"}})", {});
  EXPECT_NE(refusal().find("got kv4-calibration, version 2"), std::string::npos);
  write(with_meta(""), {});
  EXPECT_EQ(refusal(), "KV4_CALIBRATION: expected lambda of keys; got none");
  write(with_meta(R"(,"layer.2.key.matrix":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]})"),
        std::vector<float>(16, 1));
  EXPECT_EQ(refusal(),
            "KV4_CALIBRATION: expected lambda alone, of `kv4 calibrate --method lambda`; got layer.2.key.matrix");
  write(with_meta(kOne), {1, 2, 3});
  EXPECT_EQ(refusal(), "KV4_CALIBRATION: expected a whole file; got one whose layer.2.key.lambda leads out of it");
  for (const float bad : {0.0f, -1.0f, INFINITY, NAN}) {
    write(with_meta(kOne), {1, 2, bad, 4});
    EXPECT_EQ(refusal().rfind("KV4_CALIBRATION: expected positive numbers; got ", 0), 0u);
  }
  for (const char* entry :
       {R"({"dtype":"F16","shape":[1,4],"data_offsets":[0,8]})", R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})",
        R"({"dtype":"F32","shape":[1,-4],"data_offsets":[0,16]})",
        R"({"dtype":"F32","shape":[1,4],"data_offsets":[16]})", R"(7)"}) {
    write(with_meta(R"(,"layer.2.key.lambda":)" + std::string(entry)), {1, 2, 3, 4});
    EXPECT_EQ(refusal().rfind("KV4_CALIBRATION: expected float32 [kv_heads, head_dim] as layer.2.key.lambda; got ", 0),
              0u);
  }
}

TEST_F(CalibrationTest, DamageIsNeverMoreThanARefusal) {
  write(with_meta(kOne), {1, 2, 3, 4});
  std::ifstream file(path_, std::ios::binary);
  const std::string whole{std::istreambuf_iterator<char>(file), {}};
  for (std::size_t size = 0; size < whole.size(); ++size) {
    std::ofstream(path_, std::ios::binary) << whole.substr(0, size);
    EXPECT_FALSE(refusal().empty());
  }
  for (std::size_t at = 0; at < whole.size(); ++at) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x81);
    std::ofstream(path_, std::ios::binary) << damaged;
    Calibration read;
    static_cast<void>(Calibration::read(path_, &read));
  }
}

TEST_F(CalibrationTest, TheEnvironmentNamesIt) {
  write(with_meta(kOne), {1, 2, 3, 4});
  setenv("KV4_CALIBRATION", path_.c_str(), 1);
  Settings read;
  ASSERT_TRUE(read_settings(&read).ok());
  ASSERT_NE(read.calibration, nullptr);
  EXPECT_EQ(read.recipe.key.lambda, LambdaMode::given);
  EXPECT_EQ(read.recipe.value.lambda, LambdaMode::none);
  setenv("KV4_RECIPE", "exact", 1);
  EXPECT_EQ(read_settings(&read).message(), "KV4_CALIBRATION: expected none beside KV4_RECIPE=exact; got " + path_);
  unsetenv("KV4_RECIPE");
  unsetenv("KV4_CALIBRATION");
}

TEST_F(CalibrationTest, PagesAreMadeWithIt) {
  // A channel with large lambda has a small error.
  std::vector<float> lambda(64, 1.0f);
  lambda[6] = 20;
  double error[2] = {0, 0};
  for (const bool given : {false, true}) {
    write(with_meta(R"(,"layer.0.key.lambda":{"dtype":"F32","shape":[1,64],"data_offsets":[0,256]})"),
          given ? lambda : std::vector<float>(64, 1.0f));
    auto measured = std::make_shared<Calibration>();
    ASSERT_TRUE(Calibration::read(path_, measured.get()).ok());
    settings().calibration = measured;
    settings().recipe.key.lambda = LambdaMode::given;
    CacheLayer c(512, 1, {1, 1, 64, 64});
    c.write(0, 300);
    c.attend();
    const std::vector<std::byte> was = CacheLayer::bytes(c.k, 1);
    c.write(300, 1);
    const std::vector<std::byte> is = c.read(c.k, 1);
    for (std::size_t t = 0; t < 64; ++t) {
      ggml_fp16_t a = 0, b = 0;
      std::memcpy(&a, was.data() + (t * 64 + 6) * 2, 2);
      std::memcpy(&b, is.data() + (t * 64 + 6) * 2, 2);
      error[given ? 1 : 0] += std::pow(ggml_fp16_to_fp32(a) - ggml_fp16_to_fp32(b), 2);
    }
  }
  EXPECT_LT(error[1], error[0] / 4);
}

TEST_F(CalibrationTest, OneOfAnotherModelIsRefusedByTheLayer) {
  write(with_meta(kOne), {1, 2, 3, 4});
  auto measured = std::make_shared<Calibration>();
  ASSERT_TRUE(Calibration::read(path_, measured.get()).ok());
  settings().calibration = measured;
  CacheTensor k("cache_k_l2", GGML_TYPE_F16, 64, 256, 1), v("cache_v_l2", GGML_TYPE_F16, 64, 256, 1);
  Cells keys(*k.tensor), values(*v.tensor);
  std::unique_ptr<Layer> layer;
  EXPECT_EQ(Layer::create(keys, values, {1, 1, 64, 64}, &layer).message(),
            "KV4_CALIBRATION: expected this model's lambda of keys, [1, 64] for this layer; got [1, 4]");
}

TEST_F(CalibrationTest, NeighboursAreThePairsOfHalves) {
  std::vector<float> lambda = {0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15};
  pair_neighbours(&lambda, 6, 4);
  EXPECT_EQ(lambda, (std::vector<float>{0, 2, 1, 3, 4, 5, 10, 12, 11, 13, 14, 15}));
}

}  // namespace
}  // namespace kv4::llama
