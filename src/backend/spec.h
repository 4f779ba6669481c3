// A configuration as backends need it: rotations, levels and page layout.
#pragma once

#include <string>
#include <vector>

#include "backend/backend.h"
#include "kv4/cache.h"

namespace kv4 {

// The sides of a page without its layout, for tools. Errors: invalid_argument naming the matrix.
Status make_sides(const Recipe& recipe, int head_dim_k, int head_dim_v, const std::vector<float>& matrix_k,
                  const std::vector<float>& matrix_v, PageSpec* out);

// ok where both sides have codes of least_bits (of 2 to 4) up to 4 bits and no key is refined, else unsupported naming
// the field; `where`: who serves no other pages.
Status expect_plain_pages(const Recipe& recipe, const std::string& where, int least_bits = 4);

// Checks a configuration except for lambda, finds its backend and fills the spec, which stays untouched if nothing is
// ever sealed. Errors: invalid_argument naming the field; unsupported with the reason where no
// kernel serves it.
Status make_spec(const CacheConfig& config, Backend** backend, PageSpec* out);

}  // namespace kv4
