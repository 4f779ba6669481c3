// AVX-VNNI shares AVX2's operations of sealing. Included in a target region.
#pragma once

#include "cpu/avx2/seal_ops.h"

namespace kv4::cpu::avxvnni {

using SealOps = avx2::SealOps;

}  // namespace kv4::cpu::avxvnni
