// What a call writes to: every element has a place of its own, none of them in what the call reads.
#pragma once

#include "kv4/attention.h"
#include "kv4/status.h"
#include "kv4/types.h"

namespace kv4 {

// `out`, shaped as it should be and with channel stride 1. With `q`, the two share no memory.
// Errors: invalid_argument naming out.
Status check_places(const MutableTensorView& out, const TensorView* q);
// o, m and l for queries of q's shape and values of `dim` channels; they share memory neither with q nor with each
// other.
// Errors: invalid_argument naming the array.
Status check_places(const PartialState& state, const TensorView& q, int dim);

}  // namespace kv4
