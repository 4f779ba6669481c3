// Converts C arguments to C++ objects; checks every size before it reads the array.
#pragma once

#include "capi/boundary.h"
#include "kv4/attention.h"
#include "kv4/cache.h"
#include "kv4/types.h"

namespace kv4::capi {

Status in_range(const char* name, int32_t value, int32_t last, int32_t first = 0);
Status dtype_of(const char* name, int32_t value, DType* out);
Status view_of(const char* name, const kv4_tensor& t, TensorView* out);
Status view_of(const char* name, const kv4_tensor& t, MutableTensorView* out);
kv4_recipe recipe_from(const Recipe& r);
kv4_cache_config default_config();
Status config_of(const kv4_cache_config* given, CacheConfig* out);
kv4_attend_args default_args();
Status args_of(const kv4_attend_args* given, AttendArgs* out);

extern const std::span<const std::size_t> kConfigSizes, kArgsSizes;

}  // namespace kv4::capi
