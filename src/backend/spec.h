// The two sides of a page from a recipe.
#pragma once

#include <vector>

#include "backend/backend.h"

namespace kv4 {

// Fills `key` and `value` of `out`, a validated recipe's for these head dims; the layout is the backend's.
// matrix_*: [head_dim, head_dim] where that side's rotation is dense, else empty.
// Errors: invalid_argument naming matrix_k or matrix_v.
Status make_sides(const Recipe& recipe, int head_dim_k, int head_dim_v, const std::vector<float>& matrix_k,
                  const std::vector<float>& matrix_v, PageSpec* out);

}  // namespace kv4
