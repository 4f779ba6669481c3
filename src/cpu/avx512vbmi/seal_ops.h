// VBMI shares AVX-512's operations of sealing. Included in a target region.
#pragma once

#include "cpu/avx512/seal_ops.h"

namespace kv4::cpu::avx512vbmi {

using SealOps = avx512::SealOps;

}  // namespace kv4::cpu::avx512vbmi
