// Argument checks that every attention call shares.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "kv4/attention.h"

namespace kv4 {

// "[1, 8, 4, 128]".
std::string shape_text(const std::array<std::int64_t, 4>& shape);

// float32, float16 or bfloat16. Errors: invalid_argument naming `name`.
Status check_dtype(const char* name, DType dtype);
// Strides, dtypes, numbers and the mask of a call whose q has a shape that fits it. Errors: invalid_argument naming the
// argument.
Status check_arguments(const AttendArgs& args);
// Exactly one of the two, of the queries' shape with values of `dim` channels, each element with a place of its own.
// Errors: invalid_argument naming the array.
Status check_output(const AttendArgs& args, int dim, const MutableTensorView* out, const PartialState* partial);

}  // namespace kv4
