// Codes of a head slice between the device's order (layout.h) and the canonical one (format/page.h), in host memory.
#pragma once

#include <cstdint>

#include "backend/backend.h"

namespace kv4::cuda {

// k [64][head_dim_k] and v [64][head_dim_v] codes of the sides' bits; either may be null.
void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v);
// Writes the codes of the slice, padded channels as code 0; scales and mean stay as they are.
void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice);

}  // namespace kv4::cuda
