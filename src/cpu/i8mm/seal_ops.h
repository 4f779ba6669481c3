// I8MM shares NEON's operations of sealing. Included in a target region.
#pragma once

#include "cpu/neon/seal_ops.h"

namespace kv4::cpu::i8mm {

using SealOps = neon::SealOps;

}  // namespace kv4::cpu::i8mm
