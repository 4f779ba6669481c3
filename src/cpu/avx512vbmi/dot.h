// AVX-512 VNNI's products of codes that VBMI unpacks. Included in a target region.
#pragma once

#include "cpu/avx512/dot.h"
#include "cpu/avx512vbmi/unpack.h"

namespace kv4::cpu::avx512vbmi {

using Dot = avx512::DotOf<Unpack>;

}  // namespace kv4::cpu::avx512vbmi
