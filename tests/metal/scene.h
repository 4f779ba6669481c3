// A scene of attention (attend_scene.h) in the memory of the emulated device: the same codes in the device's order, the
// same rows; and calls on it.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../cpp/attend_call.h"
#include "cpu/order.h"
#include "device.h"
#include "metal/order.h"
#include "metal/tables.h"

namespace kv4::tests {

// Results of a call's kernels.
struct Ran {
  std::vector<double> out;     // [batch, q_heads, T, dim]; 0 in rows of no sequence
  std::vector<float> partial;  // instead of out, on request: rows of dim + 2
  EmuStats attend = {};
  apple::AttendTables tables;
};

struct Options {
  Build build = Build::fast;
  std::uint64_t seed = 0;  // for the order of lanes
  int cores = 8;
  bool partial = false;
  bool chunks = false;                                       // pages in scattered chunks of four
  bool blocks = false;                                       // exact rows in scattered blocks
  std::function<void(SequenceView&, int)> change = nullptr;  // edits a sequence's view before the call
  const AttendArgs* args = nullptr;                          // instead of the call's own
  std::vector<float> sinks_k = {}, sinks_v = {};             // extra rows at the end: those of exact[0]
};

class MetalScene {
 public:
  explicit MetalScene(const scene::Scene& s)
      : scene_(s), spec_(s.spec().key.rotation ? on_metal(s.spec()) : PageSpec()) {
    const int heads = s.shape().kv_heads;
    const PageMemory from = s.pages();
    memory_.head_stride = spec_.layout.head_bytes;
    memory_.page_stride = memory_.head_stride * heads;
    memory_.chunk_shift = 2;
    const std::int64_t pages = from.page_stride == 0 ? 0
                                                     : static_cast<std::int64_t>(s.pages_bytes()) / from.page_stride;
    const std::int64_t chunk = 4 * memory_.page_stride + 64, chunks = (pages + 3) / 4;
    pages_.assign(static_cast<std::size_t>(pages * memory_.page_stride), 0);
    chunked_.assign(static_cast<std::size_t>(chunks * chunk), 0);
    for (std::int64_t i = 0; i < chunks; ++i) chunk_at_.push_back((chunks - 1 - i) * chunk);
    for (std::int64_t id = 0; id < pages; ++id) {
      std::uint8_t* page = pages_.data() + id * memory_.page_stride;
      for (int h = 0; h < heads; ++h)
        convert(slice_at(from, static_cast<std::int32_t>(id), h), page + h * memory_.head_stride);
      std::memcpy(chunked_.data() + chunk_at_[static_cast<std::size_t>(id / 4)] + id % 4 * memory_.page_stride, page,
                  static_cast<std::size_t>(memory_.page_stride));
    }
    std::int32_t blocks = 0;
    for (const SequenceView& view : s.views(1))
      for (const ExactRows& x : view.exact) {
        k_at_.push_back(append(&k_, x.k, x.count == 0 ? 0 : x.k_head_stride * heads));
        v_at_.push_back(append(&v_, x.v, x.count == 0 ? 0 : x.v_head_stride * heads));
        blocks += static_cast<std::int32_t>((x.count + kPageTokens - 1) / kPageTokens);
      }
    // The same rows in blocks with descending ids.
    block_k_.assign(static_cast<std::size_t>(blocks) * block_bytes(s.shape().dim_k + 3), 0xff);
    block_v_.assign(static_cast<std::size_t>(blocks) * block_bytes(s.shape().dim_v + 5), 0xff);
    for (const SequenceView& view : s.views(1))
      for (const ExactRows& x : view.exact) {
        std::vector<std::int32_t>& ids = blocks_.emplace_back();
        for (std::int64_t row = 0; row < x.count; ++row) {
          if (row % kPageTokens == 0) ids.push_back(--blocks);
          for (int h = 0; h < heads; ++h) {
            put_row(&block_k_, blocks, h, row, x.k, h * x.k_head_stride + row * x.k_stride, x.k_stride);
            put_row(&block_v_, blocks, h, row, x.v, h * x.v_head_stride + row * x.v_stride, x.v_stride);
          }
        }
      }
  }

  Ran run(const scene::Call& call, const Options& options) const {
    const scene::Scene& s = scene_;
    const AttendArgs& args = options.args != nullptr ? *options.args : call.args;
    const std::int64_t heads = args.q.shape[1], queries = args.q.shape[2], d = s.shape().dim_v;
    std::vector<std::uint8_t> k_rows = options.blocks ? block_k_ : k_, v_rows = options.blocks ? block_v_ : v_;
    const std::size_t sinks_at[2] = {
        append(&k_rows, options.sinks_k.data(), static_cast<std::int64_t>(options.sinks_k.size())),
        append(&v_rows, options.sinks_v.data(), static_cast<std::int64_t>(options.sinks_v.size()))};
    std::vector<float> lambda_k, lambda_v;
    for (int b = 0; b < s.batch() && s.shape().lambda; ++b) {
      lambda_k.insert(lambda_k.end(), s.lambda_k(0), s.lambda_k(0) + s.shape().kv_heads * d);
      lambda_v.insert(lambda_v.end(), s.lambda_v(0), s.lambda_v(0) + s.shape().kv_heads * d);
    }
    std::vector<SequenceView> views = s.views(queries);
    for (std::size_t b = 0; b < views.size(); ++b) {
      if (s.shape().lambda) {
        views[b].lambda_k = lambda_k.data() + static_cast<std::int64_t>(b) * s.shape().kv_heads * d;
        views[b].lambda_v = lambda_v.data() + static_cast<std::int64_t>(b) * s.shape().kv_heads * d;
      }
      for (std::size_t set = 0; set < 2; ++set) {
        ExactRows& x = views[b].exact[set];
        x.k = k_rows.data() + (options.blocks ? 0 : k_at_[2 * b + set]);
        x.v = v_rows.data() + (options.blocks ? 0 : v_at_[2 * b + set]);
        if (set == 0 && !options.sinks_k.empty()) {
          x.k = k_rows.data() + sinks_at[0];
          x.v = v_rows.data() + sinks_at[1];
        }
        if (!options.blocks) continue;
        x.blocks = blocks_[2 * b + set].data();
        x.k_head_stride = x.k_stride * kPageTokens;
        x.v_head_stride = x.v_stride * kPageTokens;
        x.k_block_stride = x.k_head_stride * s.shape().kv_heads;
        x.v_block_stride = x.v_head_stride * s.shape().kv_heads;
      }
      if (options.change) options.change(views[b], static_cast<int>(b));
    }
    AttendJob job = s.job(args, views);
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
    const std::vector<std::int64_t> places = options.chunks ? apple::page_table(memory_, chunk_at_)
                                                            : apple::page_table(memory_);
    ran.tables = apple::attend_tables(job, {k_rows.data(), v_rows.data(), lambda_k.data(), lambda_v.data()}, places,
                                      options.cores);
    const apple::AttendTables& t = ran.tables;

    std::vector<float> query_matrix, output_matrix;
    if (job.spec != nullptr) {
      query_matrix = apple::query_matrix(*spec_.key.rotation);
      output_matrix = apple::output_matrix(*spec_.value.rotation);
    }
    std::vector<float> prepared(t.prepared_floats), states(t.state_floats);
    const auto u32 = [](std::int64_t x) { return static_cast<std::uint32_t>(x); };
    const std::uint32_t kv_heads = u32(s.shape().kv_heads), batch = u32(s.batch());
    {
      const Module& m = Module::get("rotate", options.build);
      const Buffer q(m, "q", call.q), matrix(m, "matrix", query_matrix), lambda(m, "lambda", lambda_k),
          sequences(m, "sequences", t.sequences);
      const Buffer table(m, "call", t.call), factors(m, "factors", t.factors),
          out(m, "out", nullptr, prepared.size() * 4, EMU_OUTPUT);
      m.run("kv4_prepare", {KV4_ROW_THREADS * u32(heads) / kv_heads, u32(queries), batch * kv_heads},
            {KV4_ROW_THREADS, 1, 1},
            {q.data(), matrix.data(), lambda.data(), sequences.data(), table.data(), factors.data(), out.data()},
            options.seed);
      prepared = out.read<float>();
    }
    const Module& m = Module::get("attend", options.build);
    const Buffer sequences(m, "sequences", t.sequences), table(m, "call", t.call);
    const Buffer states_out(m, "states", nullptr, states.size() * 4, EMU_OUTPUT);
    {
      const Buffer q(m, "queries", prepared), pages(m, "pages", options.chunks ? chunked_ : pages_),
          ids(m, "ids", t.ids), k(m, "exact_k", k_rows), v(m, "exact_v", v_rows);
      const Buffer mask(m, "mask", call.mask), levels(m, "levels", t.levels), factors(m, "factors", t.factors);
      const std::string kernel = "kv4_attend_d" + std::to_string(t.dim) + "_r" + std::to_string(t.block_rows);
      ran.attend = m.run(kernel, {KV4_ATTEND_THREADS * u32(t.splits), kv_heads * u32(t.blocks), batch},
                         {KV4_ATTEND_THREADS, 1, 1},
                         {q.data(), pages.data(), ids.data(), k.data(), v.data(), mask.data(), levels.data(),
                          sequences.data(), table.data(), factors.data(), states_out.data()},
                         options.seed);
    }
    const Buffer matrix(m, "matrix", output_matrix), lambda(m, "lambda", lambda_v), sinks(m, "sinks", call.sinks);
    const Buffer out(m, "out", memory, EMU_INOUT), state_in(m, "states", states_out.read());
    m.run("kv4_merge", {KV4_ROW_THREADS * u32(heads) / kv_heads, u32(queries), batch * kv_heads},
          {KV4_ROW_THREADS, 1, 1},
          {state_in.data(), matrix.data(), lambda.data(), sinks.data(), sequences.data(), table.data(), out.data()},
          options.seed);
    if (options.partial) {
      ran.partial = out.read<float>();
      return ran;
    }
    const std::vector<std::uint8_t> bytes = out.read();
    for (std::int64_t b = 0; b < s.batch(); ++b)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t r = 0; r < queries; ++r) {
          const SequenceView& view = views[static_cast<std::size_t>(b)];
          const bool own = r >= view.input_row && r < view.input_row + view.query_count;
          const std::uint8_t* row = bytes.data() +
                                    (view.input * job.out.stride[0] + h * width + r * heads * width) * size;
          for (std::int64_t c = 0; c < d; ++c)
            ran.out.push_back(own ? scene::element(row + c * size, call.out_dtype) : 0.0);
          for (std::int64_t i = own ? d * size : 0; i < width * size; ++i) EXPECT_EQ(row[i], kGuard);
        }
    return ran;
  }

 private:
  // Returns the byte offset of the appended data.
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

  std::size_t block_bytes(std::int64_t stride) const {
    return static_cast<std::size_t>(scene_.shape().kv_heads * kPageTokens * stride) * size_of(scene_.shape().dtype);
  }
  void put_row(std::vector<std::uint8_t>* to, std::int32_t block, int head, std::int64_t row, const void* from,
               std::int64_t element, std::int64_t stride) const {
    const std::size_t size = size_of(scene_.shape().dtype);
    const std::size_t at = static_cast<std::size_t>((head * kPageTokens + row % kPageTokens) * stride) * size;
    std::memcpy(to->data() + static_cast<std::size_t>(block) * block_bytes(stride) + at,
                static_cast<const std::uint8_t*>(from) + static_cast<std::size_t>(element) * size,
                static_cast<std::size_t>(stride) * size);
  }

  const scene::Scene& scene_;
  PageSpec spec_;
  PageMemory memory_;  // only strides are used
  std::vector<std::uint8_t> pages_, chunked_, k_, v_, block_k_, block_v_;
  std::vector<std::int64_t> chunk_at_;
  std::vector<std::vector<std::int32_t>> blocks_;
  std::vector<std::size_t> k_at_, v_at_;
};

}  // namespace kv4::tests
