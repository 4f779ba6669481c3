// Checks that the tables of a paged batch, where the host can read them, only refer to memory that the host named.
#pragma once

#include "backend/backend.h"
#include "kv4/paged.h"

namespace kv4 {

// What a call uses the tables of a batch for.
enum class Use { store, attend };

// Pointers, strides and limits. Errors: invalid_argument naming the field.
Status check_batch(const PagedBatch& batch);
// Arrays of host memory: counts, lengths and ids of all that the call would touch, of `rows` rows in its tensors; fills
// in the limits.
// Errors: out_of_range naming the array, the sequence and the value.
Status check_tables(PagedBatch* batch, Use use, std::int64_t rows);
Status check_range(const PagedBatch& batch, const PageRange& range, bool readable);
// Of arrays of host memory: that no page of the range counts as sealed.
Status check_unread(const PagedBatch& batch, const PageRange& range);

}  // namespace kv4
