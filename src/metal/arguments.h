// The tables of numbers that hosts hand to the Metal kernels, for host and device code. Entry points take buffers by
// position and no structs, so that PyTorch and MLX can call them: counts, strides (in elements) and offsets are int64
// tables, indexed by the names below, and float tables.
#ifndef KV4_METAL_ARGUMENTS_H
#define KV4_METAL_ARGUMENTS_H

// Element types as in kv4/types.h: 0 float32, 1 float16, 2 bfloat16.

// Where pages lie, the end of other tables: head h of page i begins at chunks[i >> shift] + (i & (1 << shift) - 1) *
// page_stride + h * head_stride bytes of the buffer of pages.
enum kv4_pages {
  kv4_pages_page_stride,
  kv4_pages_head_stride,
  kv4_pages_chunk_shift,  // KV4_ONE_CHUNK where one array has them all
  kv4_pages_chunks        // [chunks]
};
#define KV4_ONE_CHUNK 31

// int64 [kv4_call_pages + kv4_pages_chunks + chunks]: one call of attention.
enum kv4_call {
  kv4_call_dim,  // channels of a head, keys and values alike: 64, 80, 96, 128 or 256
  kv4_call_kv_heads,
  kv4_call_group,         // query heads per KV head
  kv4_call_queries,       // T: rows of a sequence at most
  kv4_call_block_rows,    // query rows that a threadgroup takes: the R of kv4_attend_d<D>_r<R>
  kv4_call_blocks,        // per KV head: ceil(T group / block_rows)
  kv4_call_exact_splits,  // threadgroups that share the exact rows of a block, >= 1
  kv4_call_page_splits,   // threadgroups that share the pages of a block, >= 0
  kv4_call_k_scales,      // offsets in a head slice (format/page.h)
  kv4_call_k_mean,
  kv4_call_v_codes,
  kv4_call_v_scales,
  kv4_call_has_mean,  // 0 or 1
  kv4_call_exact_dtype,
  kv4_call_causal,         // 0 or 1
  kv4_call_general_kind,   // 0 none, 1 boolean (a byte each), 2 additive
  kv4_call_general_dtype,  // of an additive mask
  kv4_call_general_stride_batch,
  kv4_call_general_stride_head,
  kv4_call_general_stride_query,
  kv4_call_general_stride_column,
  kv4_call_general_columns,
  kv4_call_general_offset,  // position of column 0
  kv4_call_q_dtype,
  kv4_call_q_stride_batch,
  kv4_call_q_stride_head,
  kv4_call_q_stride_query,
  kv4_call_out_dtype,  // or kv4_out_partial
  kv4_call_out_stride_batch,
  kv4_call_out_stride_head,
  kv4_call_out_stride_query,
  kv4_call_has_sinks,    // 0 or 1
  kv4_call_key_rotated,  // KV4_ROTATED_: how; none where there are no pages
  kv4_call_value_rotated,
  kv4_call_batch,  // sequences
  kv4_call_pages   // kv4_pages
};
// Partial states instead of output: float [.., dim + 2] rows by the out strides: o, m (natural log), l.
#define KV4_OUT_PARTIAL 3

// float [kv4_factor_fields]
enum kv4_factor {
  kv4_factor_scale,  // of q.k: scale log2(e), or scale / softcap with a cap
  kv4_factor_cap,    // softcap log2(e); 0: none
  kv4_factor_fields
};

// int64 [batch, kv4_sequence_fields]
enum kv4_sequence {
  kv4_sequence_queries,         // its rows of the call's tensors, 0 ... T
  kv4_sequence_query_position,  // of the first of them
  kv4_sequence_input,           // index of axis 0 of q, of the output and of a general mask
  kv4_sequence_input_row,       // ... and of axis 2, of its first row
  kv4_sequence_page_count,
  kv4_sequence_last_page_tokens,  // 1 ... 64
  kv4_sequence_pages_position,    // of the first page's first token
  kv4_sequence_pages_hidden,      // first tokens of the first page that no query sees there
  kv4_sequence_ids,               // index of its first page's id
  kv4_sequence_start,             // first visible position; a very small number for all
  kv4_sequence_window,            // newest positions visible up to the query's own; 0: all
  kv4_sequence_lambda_k,          // element of head 0's first channel; KV4_NONE: lambda is 1
  kv4_sequence_lambda_v,
  kv4_sequence_exact,  // two sets of exact rows, kv4_exact_fields each: sinks and window
  kv4_sequence_fields = kv4_sequence_exact + 22
};
enum kv4_exact {
  kv4_exact_position,  // of row 0
  kv4_exact_count,
  kv4_exact_ids,       // index of its first block's id, row r lying in block r / 64; -1: rows lie one after another
  kv4_exact_k_offset,  // element of row 0 of head 0, or of block 0
  kv4_exact_k_stride_head,
  kv4_exact_k_stride,  // between tokens
  kv4_exact_k_stride_block,
  kv4_exact_v_offset,
  kv4_exact_v_stride_head,
  kv4_exact_v_stride,
  kv4_exact_v_stride_block,
  kv4_exact_fields
};

// int64 [kv4_side_pages + kv4_pages_chunks + chunks]: sealing and dequantising, one table for keys and one for values.
enum kv4_side {
  kv4_side_dim,
  kv4_side_codes,  // offsets in a head slice
  kv4_side_scales,
  kv4_side_mean,
  kv4_side_has_mean,       // 0 or 1
  kv4_side_abs_max,        // 0: least squares, 1: abs-max
  kv4_side_negative_base,  // of Levels
  kv4_side_rotated,        // KV4_ROTATED_; sealing has a matrix wherever it is not none
  kv4_side_values,         // 0: keys, 1: values (their codes lie in another order)
  kv4_side_pages           // kv4_pages
};
// float [kv4_level_fields] of a side.
enum kv4_level {
  kv4_level_of_rms,  // a row's step over its rms, and over its largest magnitude: one is 0
  kv4_level_of_largest,
  kv4_level_threshold,                        // 7: between magnitudes i and i + 1
  kv4_level_table = kv4_level_threshold + 7,  // 16 levels, ascending
  kv4_level_fields = kv4_level_table + 16
};

// int64 [jobs, kv4_job_fields]: tokens [first, first + count) of one side of a page, all its heads.
enum kv4_job {
  kv4_job_page,
  kv4_job_first,
  kv4_job_count,   // with a mean: first 0, count 64
  kv4_job_hidden,  // the first rows that are masked
  kv4_job_skip,    // index of token `first` in the bytes that mask rows; -1: none
  kv4_job_rows,    // element of token `first` of head 0
  kv4_job_stride_head,
  kv4_job_stride,  // between tokens
  kv4_job_dtype,   // of the rows that are sealed; dequantised ones are float32
  kv4_job_lambda,  // element of head 0's first channel; KV4_NONE: lambda is 1
  kv4_job_fields
};

// How rows are rotated: the buffer is not read; it is a matrix (rotate.h); it is a butterfly's table (butterfly.h).
#define KV4_ROTATED_NONE 0
#define KV4_ROTATED_MATRIX 1
#define KV4_ROTATED_BUTTERFLY 2

#define KV4_NONE (-4611686018427387904)  // where nothing is, of places that may lie on either side of what is bound
#define KV4_ATTEND_THREADS 128
#define KV4_ROW_THREADS 256  // prepare, merge, seal, dequantise

#endif  // KV4_METAL_ARGUMENTS_H
