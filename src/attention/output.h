// Checks a call's outputs: no two elements overlap, and none overlaps an input.
#pragma once

#include "kv4/attention.h"
#include "kv4/status.h"
#include "kv4/types.h"

namespace kv4 {

// out: of the expected shape, with channel stride 1. It must not overlap `q`, where given.
// Errors: invalid_argument naming out.
Status check_places(const MutableTensorView& out, const TensorView* q);
// o, m and l for queries of q's shape and values of `dim` channels; they share memory neither with q nor with each
// other.
// Errors: invalid_argument naming the array.
Status check_places(const PartialState& state, const TensorView& q, int dim);

}  // namespace kv4
