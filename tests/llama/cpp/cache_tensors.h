// Keys and values as llama.cpp makes them, without llama.cpp: tensors of cells by streams in memory of their own.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <vector>

#include "cases.h"
#include "cells.h"
#include "ggml.h"
#include "layer.h"
#include "mapping.h"
#include "settings.h"

namespace kv4::llama {

struct CacheTensor {
  CacheTensor(const char* name, ggml_type type, std::int64_t channels, std::int64_t cells, std::int64_t streams) {
    context.reset(ggml_init({ggml_tensor_overhead() * 2, nullptr, true}));
    tensor = ggml_new_tensor_3d(context.get(), type, channels, cells, streams);
    ggml_set_name(tensor, name);
    EXPECT_TRUE(memory.reserve(ggml_nbytes(tensor)));
    tensor->data = memory.data();
  }
  std::unique_ptr<ggml_context, void (*)(ggml_context*)> context{nullptr, ggml_free};
  ggml_tensor* tensor = nullptr;
  Mapping memory;
};

// Keys and values of one layer, f16, the one KV head of 64 channels where nothing else is said.
struct CacheLayer {
  explicit CacheLayer(std::int64_t cells = 512, std::int64_t streams = 1, Geometry geometry = {2, 1, 64, 64},
                      ggml_type type = GGML_TYPE_F16)
      : g(geometry), k_tensor("cache_k_l0", type, g.kv_heads * g.head_dim_k, cells, streams),
        v_tensor("cache_v_l0", type, g.kv_heads * g.head_dim_v, cells, streams), k(*k_tensor.tensor),
        v(*v_tensor.tensor) {
    const Status status = Layer::create(k, v, g, &layer);
    EXPECT_TRUE(status.ok()) << status.message();
  }

  // As SET_ROWS does it: Gaussian rows into cells [first, first + n), keys before values.
  void write(std::int64_t first, std::int64_t n) {
    for (Cells* side : {&k, &v}) {
      const Status status = layer->begin_write(first, n);
      ASSERT_TRUE(status.ok()) << status.message();
      std::vector<float> row(static_cast<std::size_t>(side->channels));
      for (std::int64_t i = first; i < first + n; ++i) {
        for (float& x : row) x = normal();
        ggml_fp32_to_fp16_row(
            row.data(), reinterpret_cast<ggml_fp16_t*>(side->data + static_cast<std::size_t>(i) * side->row_bytes),
            side->channels);
        side->wrote(i);
      }
    }
  }
  void attend(int sequences = 1) {
    std::vector<float> q(static_cast<std::size_t>(g.q_heads * g.head_dim_k));
    for (float& x : q) x = normal();
    layer->attended({q.data(), DType::f32, {1, g.q_heads, 1, g.head_dim_k}, {0, g.head_dim_k, g.head_dim_k, 1}},
                    sequences);
  }
  int packed() const {
    int n = 0;
    for (std::int64_t b = 0; b < k.blocks(); ++b) n += layer->packed()[b];
    return n;
  }
  static std::vector<std::byte> bytes(const Cells& side, std::int64_t block) {
    return {side.block(block), side.block(block) + side.block_bytes()};
  }
  std::vector<std::byte> read(const Cells& side, std::int64_t block) const {
    std::vector<std::byte> out(side.block_bytes());
    const Status status = layer->read(side, block, out.data());
    EXPECT_TRUE(status.ok()) << status.message();
    return out;
  }
  float normal() {
    const auto uniform = [&] { return (static_cast<double>(random.bits() >> 11) + 0.5) * 0x1p-53; };
    return static_cast<float>(std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()));
  }

  Geometry g;
  CacheTensor k_tensor, v_tensor;
  Cells k, v;
  std::unique_ptr<Layer> layer;
  cases::Random random{7};
};

// The environment of the process, restored at the test's end.
class SettingsTest : public ::testing::Test {
 protected:
  void SetUp() override { before_ = settings(); }
  void TearDown() override { settings() = before_; }

 private:
  Settings before_;
};

}  // namespace kv4::llama
