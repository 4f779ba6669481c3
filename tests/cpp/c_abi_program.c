/* What a program in C11 sees of the header: structs without C++, the inits, an answer that is known, a refusal. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "kv4/kv4.h"

enum { DIM = 64 };

_Static_assert(offsetof(kv4_cache_config, size) == 0 && offsetof(kv4_attend_args, size) == 0, "a size comes first");

static kv4_tensor row(float* data) {
  kv4_tensor t = {data, KV4_F32, {1, 1, 1, DIM}, {DIM, DIM, DIM, 1}};
  return t;
}

/* NULL, or what failed. */
const char* kv4_c_program(void) {
  float k[DIM], v[DIM], q[DIM], out[DIM];
  for (int c = 0; c < DIM; ++c) {
    k[c] = q[c] = (float)c / DIM;
    v[c] = (float)(c - 32);
    out[c] = -1;
  }
  kv4_cache_config config;
  memset(&config, 0xff, sizeof config);
  if (kv4_cache_config_init(&config, sizeof config) != KV4_OK) return kv4_last_error();
  const kv4_recipe recipe = kv4_recipe_default();
  if (config.size != sizeof config || config.recipe.window != recipe.window || config.backend != NULL ||
      config.kv_heads != 0)
    return "the defaults of kv4_cache_config_init";
  kv4_cache* cache = NULL;
  if (kv4_cache_create(&config, &cache) != KV4_INVALID_ARGUMENT) return "kv_heads of 0 is taken";
  config.kv_heads = 1;
  config.head_dim_k = config.head_dim_v = DIM;
  if (kv4_cache_create(&config, &cache) != KV4_OK) return kv4_last_error();

  kv4_attend_args args;
  memset(&args, 0xff, sizeof args);
  if (kv4_attend_args_init(&args, sizeof args) != KV4_OK) return kv4_last_error();
  args.q = row(q);
  const kv4_tensor key = row(k), value = row(v), answer = row(out);
  if (kv4_cache_append(cache, &key, &value) != KV4_OK || kv4_cache_attend(cache, &args, &answer) != KV4_OK)
    return kv4_last_error();
  /* Attention over one token is that token's value. */
  for (int c = 0; c < DIM; ++c)
    if (out[c] != v[c]) return "the answer over one token is not its value";
  if (kv4_cache_length(cache) != 1 || kv4_cache_batch(cache) != 1 || kv4_cache_nbytes(cache) == 0)
    return "what the cache says of itself";
  if (kv4_cache_crop(cache, 2) != KV4_OUT_OF_RANGE || strstr(kv4_last_error(), "length: expected") == NULL)
    return "a crop beyond the length";
  kv4_cache_destroy(cache);
  kv4_cache_destroy(NULL);
  return NULL;
}

/* Sequences of their own length in one cache: each is answered over its own tokens, and goes without the others. All
 * keys are 0, so that an answer is the mean of the values: token t of sequence s has 10 s + t in every channel. */
const char* kv4_c_rows_program(void) {
  enum { MOST = 8 };
  float k[MOST * DIM] = {0}, v[MOST * DIM], q[MOST * DIM], out[2 * DIM], o[2 * DIM], m[2], l[2];
  for (int i = 0; i < MOST * DIM; ++i) q[i] = 1;
  kv4_cache_config config;
  kv4_attend_args args;
  kv4_cache *cache = NULL, *other = NULL;
  if (kv4_cache_config_init(&config, sizeof config) != KV4_OK || kv4_attend_args_init(&args, sizeof args) != KV4_OK)
    return kv4_last_error();
  config.kv_heads = 1;
  config.head_dim_k = config.head_dim_v = DIM;
  if (kv4_cache_create(&config, &cache) != KV4_OK || kv4_cache_add(cache, 3) != KV4_OK) return kv4_last_error();
  const kv4_row_count rows[2] = {{2, 5}, {0, 3}}, asked[2] = {{0, 1}, {2, 1}};
  for (int t = 0; t < MOST; ++t)
    for (int c = 0; c < DIM; ++c) v[t * DIM + c] = (float)(t < 5 ? 20 + t : t - 5);
  kv4_tensor keys = {k, KV4_F32, {1, 1, MOST, DIM}, {0, 0, DIM, 1}}, values = keys, query = keys, answer = keys;
  values.data = v;
  query.data = q;
  answer.data = out;
  query.shape[2] = answer.shape[2] = 2;
  args.q = query;
  if (kv4_cache_append_rows(cache, rows, 2, &keys, &values) != KV4_OK) return kv4_last_error();
  int64_t lengths[3];
  for (int b = 0; b < 3; ++b)
    if (kv4_cache_row_length(cache, b, &lengths[b]) != KV4_OK) return kv4_last_error();
  if (lengths[0] != 3 || lengths[1] != 0 || lengths[2] != 5 || kv4_cache_length(cache) != 5 ||
      kv4_cache_batch(cache) != 3)
    return "the lengths of three sequences";
  if (kv4_cache_attend_rows(cache, asked, 2, &args, &answer) != KV4_OK) return kv4_last_error();
  if (out[0] != 1 || out[DIM] != 22) return "the means of two sequences";
  const int64_t upto[2] = {2, 4}; /* values 0, 1 and 20 ... 23 */
  if (kv4_cache_attend_partial_rows(cache, asked, 2, &args, upto, o, m, l) != KV4_OK) return kv4_last_error();
  if (o[0] != 1 || l[0] != 2 || o[DIM] != 86 || l[1] != 4 || m[0] != 0) return "the states of two sequences";
  if (kv4_cache_attend_partial_rows(cache, asked, 2, &args, NULL, o, m, l) != KV4_INVALID_ARGUMENT)
    return "states up to nowhere";

  /* Without the positions 1 and 2, and cropped, sequence 2 has 20 and 23. */
  const int64_t gone[2] = {1, 0}, twice[2] = {0, 0};
  if (kv4_cache_erase(cache, 2, 1, 2) != KV4_OK || kv4_cache_crop_row(cache, 2, 2) != KV4_OK) return kv4_last_error();
  if (kv4_cache_create(&config, &other) != KV4_OK || kv4_cache_extend(other, cache) != KV4_OK) return kv4_last_error();
  if (kv4_cache_remove(cache, twice, 2) != KV4_INVALID_ARGUMENT ||
      strstr(kv4_last_error(), "rows: expected each sequence once") == NULL)
    return "a sequence removed twice";
  if (kv4_cache_remove(cache, gone, 2) != KV4_OK || kv4_cache_batch(cache) != 1 || kv4_cache_length(cache) != 2)
    return "what is left";
  const kv4_row_count last[1] = {{2, 1}}, beyond[1] = {{3, 1}};
  args.q.shape[2] = answer.shape[2] = 1;
  if (kv4_cache_attend_rows(other, last, 1, &args, &answer) != KV4_OK) return kv4_last_error();
  if (out[0] != 21.5f) return "a sequence of another cache";
  if (kv4_cache_attend_rows(other, beyond, 1, &args, &answer) != KV4_OUT_OF_RANGE ||
      strstr(kv4_last_error(), "rows: expected indices") == NULL)
    return "a sequence that is not there";
  if (kv4_cache_append_rows(other, NULL, 1, &keys, &values) != KV4_INVALID_ARGUMENT ||
      strstr(kv4_last_error(), "rows: ") == NULL)
    return "no rows";
  if (kv4_cache_row_length(other, 3, lengths) != KV4_OUT_OF_RANGE ||
      strstr(kv4_last_error(), "row: expected 0 to 2; got 3") == NULL)
    return "the length of a sequence that is not there";
  kv4_cache_destroy(other);
  kv4_cache_destroy(cache);
  return NULL;
}

/* The same of memory that the program owns: 64 tokens stored and sealed, the 65th exact, a query that sees the page and
 * the row. */
const char* kv4_c_paged_program(void) {
  enum { ROWS = 64 };
  static float rows[2 * 2 * ROWS * DIM]; /* two blocks: keys, values */
  static float k[(ROWS + 1) * DIM], v[(ROWS + 1) * DIM], q[DIM], out[DIM], o[DIM], m[1], l[1];
  static _Alignas(64) unsigned char page[8192];
  kv4_cache_config config;
  kv4_page_format* format = NULL;
  if (kv4_cache_config_init(&config, sizeof config) != KV4_OK) return kv4_last_error();
  config.kv_heads = 1;
  config.head_dim_k = config.head_dim_v = DIM;
  if (kv4_page_format_create(&config, &format) != KV4_OK) return kv4_last_error();
  const size_t bytes = kv4_page_format_page_bytes(format);
  if (bytes > sizeof page || bytes != kv4_page_format_head_bytes(format)) return "the bytes of a page";
  if (kv4_page_format_block_bytes(format) != 2 * ROWS * DIM * sizeof(float)) return "the bytes of a block";
  const kv4_page_limits limits = {1, 1, 1, ROWS, ROWS + 1, ROWS + 1};
  kv4_place place = {NULL, 0, NULL, NULL};
  if (kv4_page_format_workspace_bytes(format, &limits, NULL, &place.workspace_bytes) != KV4_OK) return kv4_last_error();
  place.workspace = malloc(place.workspace_bytes);
  if (place.workspace == NULL) return "memory for the workspace";
  if (kv4_paged_prepare(format, &place) != KV4_OK) return kv4_last_error();

  for (int t = 0; t <= ROWS; ++t)
    for (int c = 0; c < DIM; ++c) {
      k[t * DIM + c] = 0; /* every token weighs alike */
      v[t * DIM + c] = (float)(c % 2 == 0 ? t : -t);
      q[c] = 1;
    }
  const int32_t blocks[2] = {1, 0}, pages[2] = {0, -1}, zero[1] = {0}, sealed[1] = {ROWS};
  int32_t queries[2] = {0, ROWS}, lengths[1] = {ROWS};
  kv4_paged_batch batch;
  if (kv4_paged_batch_init(&batch, sizeof batch) != KV4_OK) return kv4_last_error();
  batch.sequences = 1;
  batch.queries = queries;
  batch.lengths = lengths;
  batch.sealed = zero;
  batch.pages = pages;
  batch.blocks = blocks;
  batch.pages_stride = batch.blocks_stride = 2;
  batch.page_count = 1;
  batch.block_count = 2;
  batch.page_memory.data = page;
  batch.page_memory.page_stride = batch.page_memory.head_stride = (int64_t)bytes;
  const kv4_row_memory memory = {rows, rows + ROWS * DIM, 2 * ROWS * DIM, 2 * ROWS * DIM, 0, 0, DIM, DIM};
  batch.row_memory = memory;
  kv4_tensor keys = {k, KV4_F32, {1, 1, ROWS, DIM}, {0, 0, DIM, 1}}, values = keys;
  values.data = v;
  if (kv4_paged_store(format, &batch, &keys, &values, &place) != KV4_OK) return kv4_last_error();
  const kv4_page_range range = {zero, sealed, 1};
  if (kv4_paged_seal(format, &batch, &range, &place) != KV4_OK) return kv4_last_error();
  lengths[0] = ROWS + 1;
  queries[1] = 1;
  batch.sealed = sealed;
  keys.shape[2] = values.shape[2] = 1;
  keys.data = k + ROWS * DIM;
  values.data = v + ROWS * DIM;
  if (kv4_paged_store(format, &batch, &keys, &values, &place) != KV4_OK) return kv4_last_error();

  kv4_attend_args args;
  if (kv4_attend_args_init(&args, sizeof args) != KV4_OK) return kv4_last_error();
  args.q = row(q);
  const kv4_tensor answer = row(out);
  if (kv4_paged_attend(format, &batch, &args, &answer, &place) != KV4_OK) return kv4_last_error();
  /* The mean of 0 ... 64, whose error in the rotated basis, and so in all channels together, is within half the widest
   * gap of the levels: 10.5 of 46.48, a root mean square of .23 times 32. */
  float squares = 0;
  for (int c = 0; c < DIM; ++c) {
    const float off = (c % 2 == 0 ? out[c] : -out[c]) - 32;
    squares += off * off;
  }
  if (squares / DIM > 7.3f * 7.3f) return "the answer over a page and a row";
  if (kv4_paged_attend_partial(format, &batch, &args, o, m, l, &place) != KV4_OK) return kv4_last_error();
  if (l[0] * 0.999f > ROWS + 1 || l[0] * 1.001f < ROWS + 1) return "the sum of 65 weights";
  float twice[DIM];
  const kv4_tensor same = row(twice);
  if (kv4_finish(o, m, l, NULL, &same) != KV4_OK || kv4_merge(o, m, l, o, m, l, 1, 0) != KV4_INVALID_ARGUMENT)
    return "kv4_finish and kv4_merge";
  for (int c = 0; c < DIM; ++c)
    if (twice[c] - out[c] > 1e-3f || out[c] - twice[c] > 1e-3f) return "a state that is finished is the answer";
  /* The step in one call: the row stored again, nothing sealed. */
  memset(rows, 0, sizeof rows);
  if (kv4_paged_step(format, &batch, &keys, &values, NULL, &args, &same, &place) != KV4_OK) return kv4_last_error();
  if (memcmp(twice, out, sizeof out) != 0) return "a step's answer";
  lengths[0] = 63;
  if (kv4_paged_attend(format, &batch, &args, &answer, &place) != KV4_OUT_OF_RANGE ||
      strstr(kv4_last_error(), "sealed[0]: expected") == NULL)
    return "more sealed tokens than there are";
  if (strstr(kv4_backends(), "cpu") == NULL || kv4_why_not("cpu")[0] != 0 || kv4_why_not("abacus")[0] == 0)
    return "the names of backends";
  kv4_page_format_destroy(format);
  kv4_page_format_destroy(NULL);
  free(place.workspace);
  return NULL;
}
