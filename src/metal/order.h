// Codes between the order of Apple GPUs (layout.h) and the canonical one (format/page.h), in host memory.
#pragma once

#include <cstdint>

#include "backend/backend.h"

namespace kv4::apple {

// k [64][dim / 2] and v [64][dim / 2] bytes; either may be null.
void codes_to_canonical(const PageSpec& spec, const std::uint8_t* slice, std::uint8_t* k, std::uint8_t* v);
void codes_from_canonical(const PageSpec& spec, const std::uint8_t* k, const std::uint8_t* v, std::uint8_t* slice);

}  // namespace kv4::apple
