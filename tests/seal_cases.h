// Cases of sealing that backends of devices run. `check` takes a case and compares with the reference.
#pragma once

#include <gtest/gtest.h>

#include "seal_case.h"

namespace kv4::seal_case {

using cases::kEveryDType;

// Every head dim with every rotation; levels, scale rules, means, lambda, masks and biases in turn. `step`: one of so
// many cases, for what runs slowly.
template <class F>
void every_dim_and_rotation(int step, F&& check) {
  int n = 0;
  for (int d : cases::kHeadDims) {
    for (RotationKind rotation : {RotationKind::identity, RotationKind::srft, RotationKind::srht,
                                  RotationKind::householder, RotationKind::dense}) {
      for (int repeat = 0; repeat < 3; ++repeat, ++n) {
        if (n % step != 0) continue;
        Case c;
        c.key = {d,
                 rotation,
                 0,
                 n % 3 == 0 ? LevelKind::uniform : LevelKind::lloyd_max,
                 n % 5 < 2 ? ScaleRule::abs_max : ScaleRule::least_squares,
                 repeat != 1,
                 repeat % 2 == 0};
        c.value = {d,
                   rotation,
                   0,
                   n % 4 == 1 ? LevelKind::uniform : LevelKind::lloyd_max,
                   n % 7 < 2 ? ScaleRule::abs_max : ScaleRule::least_squares,
                   false,
                   repeat == 2};
        c.dtype = kEveryDType[(n + n / 3) % 3];
        c.masked = n % 3 == 1;
        c.bias = n % 2 == 0 ? 20 : 350;
        check(c);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// A bias of keys up to 35,000 times their differences.
template <class F>
void large_key_bias(F&& check) {
  for (int d : cases::kHeadDims) {
    for (double sigma : {0.01, 0.1, 1.0, 10.0}) {
      for (DType dtype : kEveryDType) {
        Case c;
        c.key = {d, RotationKind::srft, 0, LevelKind::lloyd_max, ScaleRule::least_squares, true, true};
        c.value.dim = d;
        c.dtype = dtype;
        c.bias = 350;
        c.sigma = sigma;
        check(c);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace kv4::seal_case
