// Attention cases for every backend. `check` takes a scene and a call and compares with the reference.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "attend_call.h"

namespace kv4::scene {

using cases::kEveryDType;

// `dtypes`: of exact rows. `step`: runs every step-th case, for slow backends.
template <class F>
void every_head_dim_and_group(std::span<const DType> dtypes, int step, F&& check) {
  int n = 0;
  for (int d : cases::kHeadDims) {
    for (int group : {1, 2, 3, 4, 6, 7, 8, 9, 12, 16}) {
      if (n++ % step != 0) continue;
      SCOPED_TRACE("head_dim " + std::to_string(d) + ", group " + std::to_string(group));
      Shape shape;
      shape.dim_k = shape.dim_v = d;
      shape.group = group;
      shape.kv_heads = 1 + n % 2;
      shape.dtype = dtypes[static_cast<std::size_t>(n) % dtypes.size()];
      shape.seed = static_cast<std::uint64_t>(n);
      const Scene s(shape, {Held::of(200)});
      check(s, Call(s, 1, kEveryDType[n / 2 % 3]));
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

// No exact rows, a last page with few tokens, each format of a page.
template <class F>
void pages_and_a_part_of_one(F&& check) {
  std::uint64_t seed = 2000;
  for (int tokens : {1, 17, 63, 64, 65, 130, 640, 1000}) {
    SCOPED_TRACE(tokens);
    Shape shape;
    shape.dim_k = shape.dim_v = seed % 2 == 0 ? 96 : 128;
    shape.group = 3;
    shape.mean = seed % 3 != 0;
    shape.levels = seed % 3 == 1 ? LevelKind::uniform : LevelKind::lloyd_max;
    shape.lambda = seed % 4 != 2;
    shape.seed = seed++;
    const Scene s(shape, {Held{0, tokens, 0, 0}});
    check(s, Call(s, 1));
    if (testing::Test::HasFatalFailure()) return;
  }
}

// Several queries: draft verification, chunked prefill.
template <class F>
void many_queries(std::span<const DType> dtypes, std::initializer_list<int> counts, F&& check) {
  std::uint64_t seed = 3000;
  for (int queries : counts) {
    for (int group : {1, 4, 6}) {
      SCOPED_TRACE(std::to_string(queries) + " queries, group " + std::to_string(group));
      Shape shape;
      shape.dim_k = shape.dim_v = seed % 3 == 0 ? 256 : 128;
      shape.group = group;
      shape.kv_heads = 1;
      shape.dtype = dtypes[seed % dtypes.size()];
      shape.seed = seed++;
      const Scene s(shape, {Held{4, 320, 90, 0}});
      check(s, Call(s, queries, shape.dtype));
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

// Different sequences in one batch, each with its own start and window; `longest`: page tokens of the longest.
template <class F>
void ragged_batch(std::initializer_list<int> counts, int longest, F&& check) {
  std::uint64_t seed = 4000;
  for (int queries : counts) {
    SCOPED_TRACE(std::to_string(queries) + " queries");
    Shape shape;
    shape.group = 4;
    shape.seed = seed++;
    const Scene s(shape, {Held{4, 640, 70, 0}, Held{0, 0, 40, 3}, Held{4, 128, 127, 20}, Held{2, 0, 9, 0},
                          Held{0, longest, 64, 0}});
    Call call(s, queries);
    call.starts({5, 10, 25, 0, 100});
    call.windows({200, 0, 64, 4, 1000});
    call.with_sinks();
    check(s, call);
    if (testing::Test::HasFatalFailure()) return;
  }
}

// `wide`: whether masks have a row for each head and query or one for all; softcap is on with it.
template <class F>
void general_masks(std::initializer_list<bool> widths, F&& check) {
  std::uint64_t seed = 5000;
  for (Mask::General kind : {Mask::General::boolean, Mask::General::additive}) {
    for (DType dtype : kEveryDType) {
      if (kind == Mask::General::boolean && dtype != DType::f32) continue;
      for (bool wide : widths) {
        SCOPED_TRACE(std::string(name_of(dtype)) + (wide ? ", wide" : ""));
        Shape shape;
        shape.group = 3;
        shape.seed = seed++;
        const Scene s(shape, {Held{4, 200, 50, 0}, Held{4, 64, 66, 30}});
        Call call(s, 3);
        call.general(kind, dtype, 254, wide, wide);
        call.args.softcap = wide ? 3.0f : 0.0f;
        call.args.scale = 0.2f;
        check(s, call);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// The mean adds hundreds to every score of a page; softmax must cancel it.
template <class F>
void large_means(F&& check) {
  Shape shape;
  shape.bias = 30;
  shape.group = 6;
  shape.seed = 77;
  const Scene s(shape, {Held{4, 1024, 64, 0}});
  check(s, Call(s, 1));
}

}  // namespace kv4::scene
