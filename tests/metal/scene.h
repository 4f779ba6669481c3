// A scene of attention (attend_scene.h) in the memory of the emulated device: the same codes in the device's order, the same
// rows; and calls on it.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cpp/attend_call.h"
#include "cpu/order.h"
#include "device.h"
#include "metal/order.h"
#include "metal/tables.h"

namespace kv4::tests {

// What the kernels of a call did.
struct Ran {
  std::vector<double> out;         // [batch, q_heads, T, dim]
  std::vector<float> partial;      // instead, where asked for: rows of dim + 2
  EmuStats attend = {};
  apple::AttendTables tables;
};

struct Options {
  Build build = Build::fast;
  std::uint64_t seed = 0;  // of the order of lanes
  int cores = 8;
  bool partial = false;
};

class MetalScene {
 public:
  explicit MetalScene(const scene::Scene& s) : scene_(s), spec_(s.spec().key.rotation ? on_metal(s.spec()) : PageSpec()) {
    const int heads = s.shape().kv_heads;
    const std::vector<SequenceView> views = s.views(1);
    const std::size_t page_bytes = std::size_t{spec_.layout.head_bytes} * static_cast<std::size_t>(heads);
    std::size_t pages = 0;
    for (const SequenceView& v : views) pages += static_cast<std::size_t>(v.page_count);
    pages_.assign(page_bytes * pages, 0);
    // Pages lie in the pool in an order of their own.
    std::size_t next = 0;
    for (const SequenceView& from : views) {
      pointers_.emplace_back();
      for (int p = 0; p < from.page_count; ++p, ++next) {
        std::uint8_t* page = pages_.data() + (pages - 1 - next) * page_bytes;
        for (int h = 0; h < heads; ++h)
          convert(from.pages[p] + static_cast<std::size_t>(h) * s.spec().layout.head_bytes, page + static_cast<std::size_t>(h) * spec_.layout.head_bytes);
        pointers_.back().push_back(page);
      }
      for (const ExactRows& x : from.exact) {
        k_at_.push_back(append(&k_, x.k, x.count == 0 ? 0 : x.k_head_stride * heads));
        v_at_.push_back(append(&v_, x.v, x.count == 0 ? 0 : x.v_head_stride * heads));
      }
    }
  }

  Ran run(const scene::Call& call, const Options& options) const {
    const scene::Scene& s = scene_;
    const std::int64_t heads = call.args.q.shape[1], queries = call.args.q.shape[2], d = s.shape().dim_v;
    std::vector<SequenceView> views = s.views(queries);
    for (std::size_t b = 0; b < views.size(); ++b) {
      views[b].pages = pointers_[b].data();
      for (std::size_t set = 0; set < 2; ++set) {
        views[b].exact[set].k = k_.data() + k_at_[2 * b + set];
        views[b].exact[set].v = v_.data() + v_at_[2 * b + set];
      }
    }
    AttendJob job = s.job(call.args, views);
    if (job.spec != nullptr) job.spec = &spec_;
    const std::int64_t width = d + 2, size = options.partial ? 4 : static_cast<std::int64_t>(size_of(call.out_dtype));
    std::vector<std::uint8_t> memory(static_cast<std::size_t>(s.batch() * queries * heads * width * size), kGuard);
    if (!options.partial) {
      job.out.data = memory.data();
      job.out.dtype = call.out_dtype;
      job.out.shape = {s.batch(), heads, queries, d};
      job.out.stride = {queries * heads * width, width, heads * width, 1};
    }
    Ran ran;
    ran.tables = apple::attend_tables(job, {pages_.data(), k_.data(), v_.data()}, options.cores);
    const apple::AttendTables& t = ran.tables;

    std::vector<float> query_matrix, output_matrix;
    if (job.spec != nullptr) {
      query_matrix = apple::query_matrix(*spec_.key.rotation);
      output_matrix = apple::output_matrix(*spec_.value.rotation);
    }
    std::vector<float> lambda_k, lambda_v;
    for (int b = 0; b < s.batch() && s.shape().lambda; ++b) {
      lambda_k.insert(lambda_k.end(), s.lambda_k(0), s.lambda_k(0) + s.shape().kv_heads * d);
      lambda_v.insert(lambda_v.end(), s.lambda_v(0), s.lambda_v(0) + s.shape().kv_heads * d);
    }
    std::vector<float> prepared(t.prepared_floats), states(t.state_floats);
    const auto u32 = [](std::int64_t x) { return static_cast<std::uint32_t>(x); };
    const std::uint32_t kv_heads = u32(s.shape().kv_heads), batch = u32(s.batch());
    {
      const Module& m = Module::get("rotate", options.build);
      const Buffer q(m, "q", call.q), matrix(m, "matrix", query_matrix), lambda(m, "lambda", lambda_k), sequences(m, "sequences", t.sequences);
      const Buffer table(m, "call", t.call), factors(m, "factors", t.factors), out(m, "out", nullptr, prepared.size() * 4, EMU_OUTPUT);
      m.run("kv4_prepare", {KV4_ROW_THREADS * u32(heads) / kv_heads, u32(queries), batch * kv_heads}, {KV4_ROW_THREADS, 1, 1},
            {q.data(), matrix.data(), lambda.data(), sequences.data(), table.data(), factors.data(), out.data()}, options.seed);
      prepared = out.read<float>();
    }
    const Module& m = Module::get("attend", options.build);
    const Buffer sequences(m, "sequences", t.sequences), table(m, "call", t.call);
    const Buffer states_out(m, "states", nullptr, states.size() * 4, EMU_OUTPUT);
    {
      const Buffer q(m, "queries", prepared), pages(m, "pages", pages_), page_table(m, "table", t.pages), k(m, "exact_k", k_), v(m, "exact_v", v_);
      const Buffer mask(m, "mask", call.mask), levels(m, "levels", t.levels), factors(m, "factors", t.factors);
      const std::string kernel = "kv4_attend_d" + std::to_string(t.dim) + "_r" + std::to_string(t.block_rows);
      ran.attend = m.run(kernel, {KV4_ATTEND_THREADS * u32(t.splits), kv_heads * u32(t.blocks), batch}, {KV4_ATTEND_THREADS, 1, 1},
                         {q.data(), pages.data(), page_table.data(), k.data(), v.data(), mask.data(), levels.data(), sequences.data(),
                          table.data(), factors.data(), states_out.data()}, options.seed);
    }
    const Buffer matrix(m, "matrix", output_matrix), lambda(m, "lambda", lambda_v), sinks(m, "sinks", call.sinks);
    const Buffer out(m, "out", memory, EMU_INOUT), state_in(m, "states", states_out.read());
    m.run("kv4_merge", {KV4_ROW_THREADS * u32(heads) / kv_heads, u32(queries), batch * kv_heads}, {KV4_ROW_THREADS, 1, 1},
          {state_in.data(), matrix.data(), lambda.data(), sinks.data(), sequences.data(), table.data(), out.data()}, options.seed);
    if (options.partial) {
      ran.partial = out.read<float>();
      return ran;
    }
    const std::vector<std::uint8_t> bytes = out.read();
    for (std::int64_t b = 0; b < s.batch(); ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t r = 0; r < queries; ++r) {
          const std::uint8_t* row = bytes.data() + (b * job.out.stride[0] + h * width + r * heads * width) * size;
          for (std::int64_t c = 0; c < d; ++c) ran.out.push_back(element(row + c * size, call.out_dtype));
          for (std::int64_t i = d * size; i < width * size; ++i) EXPECT_EQ(row[i], kGuard);
        }
    return ran;
  }

 private:
  static double element(const std::uint8_t* at, DType dtype) {
    if (dtype == DType::f32) {
      float f;
      std::memcpy(&f, at, 4);
      return f;
    }
    std::uint16_t h;
    std::memcpy(&h, at, 2);
    return dtype == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
  }

  // Byte offset of what was appended.
  std::size_t append(std::vector<std::uint8_t>* to, const void* from, std::int64_t elements) const {
    const std::size_t at = to->size(), bytes = static_cast<std::size_t>(elements) * size_of(scene_.shape().dtype);
    to->resize(at + bytes);
    if (bytes > 0) std::memcpy(to->data() + at, from, bytes);
    return at;
  }

  void convert(const std::uint8_t* from, std::uint8_t* to) const {
    const kv4_page_layout &a = scene_.spec().layout, &b = spec_.layout;
    std::vector<std::uint8_t> k(32u * a.head_dim_k), v(32u * a.head_dim_v);
    cpu::codes_to_canonical(scene_.spec(), from, k.data(), v.data());
    apple::codes_from_canonical(spec_, k.data(), v.data(), to);
    std::memcpy(to + b.k_scales, from + a.k_scales, a.groups_k * 128);
    if (spec_.key.mean) std::memcpy(to + b.k_mean, from + a.k_mean, a.head_dim_k * 2);
    std::memcpy(to + b.v_scales, from + a.v_scales, a.groups_v * 128);
  }

  const scene::Scene& scene_;
  PageSpec spec_;
  std::vector<std::uint8_t> pages_, k_, v_;
  std::vector<std::vector<const std::uint8_t*>> pointers_;
  std::vector<std::size_t> k_at_, v_at_;
};

}  // namespace kv4::tests
