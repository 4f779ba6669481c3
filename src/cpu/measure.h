// Figures that benchmarks compare with: sealing alone, and the speed of memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kv4/rotation.h"
#include "kv4/status.h"

namespace kv4::cpu {

// Times sealing alone, for benchmarks: `vectors` float vectors (rounded up to whole pages of keys and values)
// of head dim `dim`, already in place, are rotated, scaled by a lambda per channel, quantised to uniform levels
// by their abs-max and packed, `repeats` times after one warm-up, on num_threads() threads.
// ns_per_vector: one wall-clock figure per repeat. Errors: invalid_argument; unsupported; out_of_memory.
Status measure_seal(int dim, RotationKind rotation, std::int64_t vectors, int repeats,
                    std::vector<double>* ns_per_vector);

// Times reading `bytes` of memory (rounded up to whole kilobytes a thread) in order and once, with the instruction
// set in use and on num_threads() threads, `repeats` times after one warm-up: the speed that no attention can
// exceed where its cache comes from memory. Choose `bytes` several times the size of the last-level cache.
// bytes_per_second: one figure per repeat. Errors: invalid_argument; out_of_memory.
Status measure_read(std::size_t bytes, int repeats, std::vector<double>* bytes_per_second);

}  // namespace kv4::cpu
