/* The C ABI of kv4. Every call that can fail returns a kv4_status; kv4_last_error() then holds
 * "argument: expected ...; got ..." for the calling thread. No call throws. Semantics are those of kv4/cache.h.
 * Tensors are [batch, heads, tokens, channels]; strides count elements; the channel stride is 1.
 *
 * Versions. kv4_cache_config, kv4_attend_args and kv4_paged_batch begin with their size, which says how much of them
 * the program knows, and may grow at their end; kv4_..._init(&x, sizeof x) sets the size and every default. A library
 * reads a struct of an older header with defaults for what it lacks. One of a newer header is taken where all that the
 * library does not know is zero, and refused as KV4_UNSUPPORTED otherwise. The other structs never change. */
#ifndef KV4_KV4_H
#define KV4_KV4_H

#include <stddef.h>
#include <stdint.h>

#include "kv4/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kv4_status {
  KV4_OK = 0,
  KV4_INVALID_ARGUMENT = 1,
  KV4_OUT_OF_RANGE = 2,
  KV4_UNSUPPORTED = 3,
  KV4_NON_FINITE = 4,
  KV4_OUT_OF_MEMORY = 5,
  KV4_FAILED_PRECONDITION = 6,
  KV4_DATA_LOSS = 7, /* bytes that are no intact saved cache */
  KV4_INTERNAL = 8   /* an exception within the library; kv4_last_error() has its text */
} kv4_status;

typedef enum kv4_dtype { KV4_F32 = 0, KV4_F16 = 1, KV4_BF16 = 2 } kv4_dtype;
typedef enum kv4_rotation {
  KV4_ROTATION_IDENTITY = 0,
  KV4_ROTATION_SRFT = 1,
  KV4_ROTATION_SRHT = 2,
  KV4_ROTATION_HOUSEHOLDER = 3,
  KV4_ROTATION_DENSE = 4
} kv4_rotation;
typedef enum kv4_levels { KV4_LEVELS_LLOYD_MAX = 0, KV4_LEVELS_UNIFORM = 1, KV4_LEVELS_TRELLIS = 2 } kv4_levels;
typedef enum kv4_scale { KV4_SCALE_LEAST_SQUARES = 0, KV4_SCALE_ABS_MAX = 1 } kv4_scale;
typedef enum kv4_lambda { KV4_LAMBDA_NONE = 0, KV4_LAMBDA_AUTOMATIC = 1, KV4_LAMBDA_GIVEN = 2 } kv4_lambda;
typedef enum kv4_seal { KV4_SEAL_PAGE = 0, KV4_SEAL_ARRIVAL = 1, KV4_SEAL_NEVER = 2 } kv4_seal;

typedef struct kv4_side_recipe {
  int32_t rotation;   /* kv4_rotation */
  int32_t reflectors; /* Householder only; 0 means d/2 */
  uint64_t seed;
  int32_t group;  /* channels per scale: 0 (the whole vector), 128, 64 or 32 */
  int32_t levels; /* kv4_levels */
  int32_t scale;  /* kv4_scale */
  int32_t mean;   /* keys: 1 subtracts the page's mean */
  int32_t lambda; /* kv4_lambda */
} kv4_side_recipe;

typedef struct kv4_recipe {
  kv4_side_recipe key, value;
  int32_t seal;   /* kv4_seal */
  int32_t sinks;  /* first tokens kept exact */
  int32_t window; /* newest tokens kept exact */
} kv4_recipe;

KV4_API kv4_recipe kv4_recipe_default(void);
KV4_API kv4_recipe kv4_recipe_paper(void);
KV4_API kv4_recipe kv4_recipe_exact(void);

typedef struct kv4_cache_config {
  size_t size; /* sizeof(kv4_cache_config), by kv4_cache_config_init */
  kv4_recipe recipe;
  int32_t dtype;    /* kv4_dtype of appended and exact tokens */
  int32_t kv_heads; /* 1 to 65,536 */
  int32_t head_dim_k, head_dim_v;
  int32_t sliding_window; /* 0: none */
  const float* lambda_k;  /* [kv_heads, head_dim_k] or NULL */
  const float* lambda_v;  /* [kv_heads, head_dim_v] or NULL */
  const float* matrix_k;  /* [head_dim_k, head_dim_k] or NULL */
  const float* matrix_v;  /* [head_dim_v, head_dim_v] or NULL */
  /* A size may end here. */
  const char* backend; /* NULL: "cpu"; "cuda", "cuda:1", ...: tensors of calls are the device's memory */
  /* A size may end here. */
  int32_t bits_k, bits_v; /* of a code of keys and of values: 2, 3, 4, 6 or 8, on CUDA 2 to 4; 0: 4 */
  /* A size may end here. */
  int32_t refined; /* keys of a page with a second row of codes, 0 to 2; others than 0 on the CPU */
} kv4_cache_config;
/* Writes `size` bytes: the default recipe, float32, and 0 elsewhere, which leaves kv_heads and the head dims to be set.
 */
KV4_API kv4_status kv4_cache_config_init(kv4_cache_config* config, size_t size);

typedef struct kv4_tensor {
  void* data;    /* of an output: memory that may be written to, a place for every element, none of it the query's */
  int32_t dtype; /* kv4_dtype */
  int64_t shape[4];
  int64_t stride[4];
} kv4_tensor;

typedef enum kv4_mask_kind { KV4_MASK_NONE = 0, KV4_MASK_BOOLEAN = 1, KV4_MASK_ADDITIVE = 2 } kv4_mask_kind;

typedef struct kv4_attend_args {
  size_t size;           /* sizeof(kv4_attend_args), by kv4_attend_args_init */
  kv4_tensor q;          /* [batch, q_heads, T, head_dim_k]: the newest T positions */
  float scale;           /* 0: head_dim_k^-0.5 */
  float softcap;         /* 0: none */
  const float* sinks;    /* [q_heads] or NULL */
  int32_t causal;        /* nonzero: column position <= query position */
  int64_t offset;        /* position of column 0 of start and mask */
  const int32_t* start;  /* [batch] first visible column, or NULL */
  const int32_t* window; /* [batch] newest visible columns, 0 all; or NULL */
  int32_t mask_kind;     /* kv4_mask_kind */
  const void* mask;      /* [batch, q_heads, T, columns] by mask_stride */
  int32_t mask_dtype;    /* kv4_dtype of an additive mask */
  int64_t mask_stride[4];
  int64_t columns;
  /* A size may end here. */
  const void* host_mask; /* where mask is a device's memory: a copy in host memory, or NULL (kv4/attention.h) */
  int64_t host_mask_stride[4];
} kv4_attend_args;
/* Writes `size` bytes: causal, and 0 elsewhere, which leaves q to be set. */
KV4_API kv4_status kv4_attend_args_init(kv4_attend_args* args, size_t size);

typedef struct kv4_cache kv4_cache;

/* Where saved bytes go: takes all of them, or says why not. Where they come from: fills all of it, or says why not.
 * What they return is what the call returns. */
typedef kv4_status (*kv4_sink)(void* context, const void* data, size_t bytes);
typedef kv4_status (*kv4_source)(void* context, void* data, size_t bytes);

KV4_API const char* kv4_version(void);
KV4_API const char* kv4_last_error(void);

KV4_API kv4_status kv4_cache_create(const kv4_cache_config* config, kv4_cache** out);
KV4_API void kv4_cache_destroy(kv4_cache* cache); /* NULL is allowed */
KV4_API kv4_status kv4_cache_append(kv4_cache* cache, const kv4_tensor* k, const kv4_tensor* v);
KV4_API kv4_status kv4_cache_attend(kv4_cache* cache, const kv4_attend_args* args, const kv4_tensor* out);
/* o [batch, q_heads, T, head_dim_v], m and l [batch, q_heads, T], contiguous float. */
KV4_API kv4_status kv4_cache_attend_partial(kv4_cache* cache, const kv4_attend_args* args, int64_t upto, float* o,
                                            float* m, float* l);
/* Sequences each of their own length: calls for some of them, whose rows follow each other on axis 2 of tensors with a
 * batch of 1, in the order of `rows`; start and window of a mask have one value for each of these. */
typedef struct kv4_row_count {
  int64_t row; /* of the cache; named once at most */
  int64_t tokens;
} kv4_row_count;
KV4_API kv4_status kv4_cache_append_rows(kv4_cache* cache, const kv4_row_count* rows, size_t count, const kv4_tensor* k,
                                         const kv4_tensor* v);
KV4_API kv4_status kv4_cache_attend_rows(kv4_cache* cache, const kv4_row_count* rows, size_t count,
                                         const kv4_attend_args* args, const kv4_tensor* out);
/* upto [count]; o [1, q_heads, T, head_dim_v], m and l [1, q_heads, T]. */
KV4_API kv4_status kv4_cache_attend_partial_rows(kv4_cache* cache, const kv4_row_count* rows, size_t count,
                                                 const kv4_attend_args* args, const int64_t* upto, float* o, float* m,
                                                 float* l);
KV4_API kv4_status kv4_cache_add(kv4_cache* cache, int32_t count); /* empty sequences, behind the others */
KV4_API kv4_status kv4_cache_remove(kv4_cache* cache, const int64_t* rows, size_t count);
KV4_API kv4_status kv4_cache_extend(
    kv4_cache* cache, const kv4_cache* other); /* of the same configuration: its sequences go on here too */
KV4_API kv4_status kv4_cache_crop_row(kv4_cache* cache, int32_t row, int64_t length);
KV4_API kv4_status kv4_cache_erase(kv4_cache* cache, int32_t row, int64_t first,
                                   int64_t count); /* positions; those behind move up */
KV4_API kv4_status kv4_cache_row_length(const kv4_cache* cache, int32_t row, int64_t* out);
KV4_API kv4_status kv4_cache_seal(kv4_cache* cache);
/* Devices: the stream (a cudaStream_t) of the calls that follow; room for tokens; a captured step's next token. */
KV4_API kv4_status kv4_cache_set_stream(kv4_cache* cache, void* stream);
KV4_API kv4_status kv4_cache_reserve(kv4_cache* cache, int64_t tokens);
KV4_API kv4_status kv4_cache_advance(kv4_cache* cache);
KV4_API kv4_status kv4_cache_crop(kv4_cache* cache, int64_t length);
KV4_API kv4_status kv4_cache_select(kv4_cache* cache, const int64_t* rows, size_t count);
KV4_API kv4_status kv4_cache_repeat(kv4_cache* cache, int32_t times);
KV4_API kv4_status kv4_cache_reset(kv4_cache* cache);
KV4_API kv4_status kv4_cache_clone(const kv4_cache* cache, kv4_cache** out);
KV4_API kv4_status kv4_cache_record_past(kv4_cache* cache, int32_t on);
/* The cache as a self-describing blob, and back into an empty cache of the same configuration (docs/format.md). */
KV4_API kv4_status kv4_cache_save(const kv4_cache* cache, kv4_sink sink, void* context);
KV4_API kv4_status kv4_cache_load(kv4_cache* cache, kv4_source source, void* context);
KV4_API kv4_status kv4_cache_dense_keys(const kv4_cache* cache, int64_t first, int64_t count, const kv4_tensor* out);
KV4_API kv4_status kv4_cache_dense_values(const kv4_cache* cache, int64_t first, int64_t count, const kv4_tensor* out);
KV4_API size_t kv4_cache_nbytes(const kv4_cache* cache);
KV4_API int64_t kv4_cache_length(const kv4_cache* cache); /* of the longest sequence */
KV4_API int64_t kv4_cache_first(const kv4_cache* cache);
KV4_API int32_t kv4_cache_batch(const kv4_cache* cache);

/* Partial states of kv4_cache_attend_partial and kv4_paged_attend_partial over disjoint tokens: into becomes both, for
 * `rows` rows of `dim` channels; then output = o / (l + exp(sink - m)), sinks [q_heads] or NULL, out [batch, q_heads,
 * T, dim] by its strides. */
KV4_API kv4_status kv4_merge(float* into_o, float* into_m, float* into_l, const float* o, const float* m,
                             const float* l, int64_t rows, int32_t dim);
KV4_API kv4_status kv4_finish(const float* o, const float* m, const float* l, const float* sinks,
                              const kv4_tensor* out);

/* Names of the backends that are built in and find a device, with commas between them; valid until the thread's next
 * call of it. */
KV4_API const char* kv4_backends(void);
/* Why one is not among them, "" where it is; likewise. */
KV4_API const char* kv4_why_not(const char* backend);

/* Threads that a program lends. run calls body(body_context, i) once for every i in [0, threads), on as many threads as
 * are free, one of them the caller's, and returns when all calls have (kv4/cpu.h). */
typedef struct kv4_executor {
  int32_t threads;
  void (*run)(void* context, void (*body)(void* body_context, int32_t thread), void* body_context);
  void* context;
} kv4_executor;
/* Calls that this thread makes from here on share their work through it; it must outlive them. NULL: the process's own
 * threads. */
KV4_API kv4_status kv4_set_executor(const kv4_executor* executor);

/* Memory that a host owns: the operations of kv4/paged.h, with its fields and its promises. Arrays are memory that
 * kernels read. */

typedef struct kv4_page_memory {
  void* data;
  void* const* chunks;              /* NULL: all in data */
  int64_t page_stride, head_stride; /* bytes */
  int64_t chunk_shift;
} kv4_page_memory;

typedef struct kv4_row_memory {
  void* k;
  void* v;
  int64_t k_block_stride, v_block_stride, k_head_stride, v_head_stride, k_stride, v_stride; /* elements */
} kv4_row_memory;

typedef struct kv4_paged_batch {
  size_t size; /* sizeof(kv4_paged_batch), by kv4_paged_batch_init */
  int32_t sequences;
  int32_t sink_tokens;
  const int32_t* queries; /* [sequences + 1] */
  const int32_t* lengths; /* [sequences] */
  const int32_t* sealed;  /* [sequences] */
  const int32_t* pages;   /* [sequences, pages_stride] */
  int64_t pages_stride;
  const int32_t* blocks; /* [sequences, blocks_stride] */
  int64_t blocks_stride;
  const int32_t* sinks; /* [sequences] or NULL */
  int32_t window;
  int32_t page_count, block_count;
  kv4_page_memory page_memory;
  kv4_row_memory row_memory;
  int64_t* non_finite;   /* [sequences, 2] or NULL */
  const float* lambda_k; /* NULL: 1 */
  const float* lambda_v;
  int64_t lambda_k_stride, lambda_v_stride; /* floats; 0: one for all */
  int64_t most_queries, longest, all;
} kv4_paged_batch;
/* Writes `size` bytes: 0 everywhere else. */
KV4_API kv4_status kv4_paged_batch_init(kv4_paged_batch* batch, size_t size);

typedef struct kv4_page_range {
  const int32_t* begin; /* [sequences] */
  const int32_t* end;   /* [sequences] */
  int32_t most;
} kv4_page_range;

typedef struct kv4_page_limits {
  int32_t sequences, q_heads, most_pages;
  int64_t most_queries, longest, all;
} kv4_page_limits;

/* The caller's workspace and where a call runs. */
typedef struct kv4_place {
  void* workspace;
  size_t workspace_bytes;
  void* stream;                 /* a cudaStream_t; NULL: the device's default */
  const kv4_executor* executor; /* NULL: this thread's */
} kv4_place;

typedef struct kv4_page_format kv4_page_format;

KV4_API kv4_status kv4_page_format_create(const kv4_cache_config* config, kv4_page_format** out);
KV4_API void kv4_page_format_destroy(kv4_page_format* format); /* NULL is allowed */
KV4_API size_t kv4_page_format_head_bytes(const kv4_page_format* format);
KV4_API size_t kv4_page_format_page_bytes(const kv4_page_format* format);
KV4_API size_t kv4_page_format_block_bytes(const kv4_page_format* format);
KV4_API kv4_status kv4_page_format_workspace_bytes(const kv4_page_format* format, const kv4_page_limits* limits,
                                                   const kv4_executor* executor, size_t* out);
KV4_API kv4_status kv4_paged_prepare(const kv4_page_format* format, const kv4_place* place);
KV4_API kv4_status kv4_paged_store(const kv4_page_format* format, const kv4_paged_batch* batch, const kv4_tensor* k,
                                   const kv4_tensor* v, const kv4_place* place);
KV4_API kv4_status kv4_paged_seal(const kv4_page_format* format, const kv4_paged_batch* batch,
                                  const kv4_page_range* range, const kv4_place* place);
KV4_API kv4_status kv4_paged_dequantise(const kv4_page_format* format, const kv4_paged_batch* batch,
                                        const kv4_page_range* range, const kv4_place* place);
KV4_API kv4_status kv4_paged_attend(const kv4_page_format* format, const kv4_paged_batch* batch,
                                    const kv4_attend_args* args, const kv4_tensor* out, const kv4_place* place);
/* range NULL: nothing is sealed. */
KV4_API kv4_status kv4_paged_step(const kv4_page_format* format, const kv4_paged_batch* batch, const kv4_tensor* k,
                                  const kv4_tensor* v, const kv4_page_range* range, const kv4_attend_args* args,
                                  const kv4_tensor* out, const kv4_place* place);
KV4_API kv4_status kv4_paged_attend_partial(const kv4_page_format* format, const kv4_paged_batch* batch,
                                            const kv4_attend_args* args, float* o, float* m, float* l,
                                            const kv4_place* place);
KV4_API kv4_status kv4_paged_learn_lambda(const kv4_page_format* format, const kv4_tensor* q, const kv4_tensor* k,
                                          float* lambda, const kv4_place* place);

KV4_API kv4_status kv4_set_num_threads(int32_t threads);
KV4_API int32_t kv4_num_threads(void);
/* Bits of the integers that queries and attention weights become where they meet packed codes, 8 (the default, where an
 * instruction set multiplies bytes faster and codes have at most 4 bits) or 16: kv4/cpu.h. */
KV4_API kv4_status kv4_set_operand_bits(int32_t bits);
KV4_API int32_t kv4_operand_bits(void);
KV4_API kv4_status kv4_force_isa(const char* isa); /* "" or NULL: the best */
/* Valid until the thread's next call of it. "" where KV4_CPU_ISA names one that is not here; kv4_last_error() then says
 * so. */
KV4_API const char* kv4_active_isa(void);

#ifdef __cplusplus
}
#endif

#endif /* KV4_KV4_H */
