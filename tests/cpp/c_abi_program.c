/* What a program in C11 sees of the header: structs without C++, the inits, an answer that is known, a refusal. */
#include <stddef.h>
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
  if (config.size != sizeof config || config.recipe.window != recipe.window || config.backend != NULL || config.kv_heads != 0)
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
  if (kv4_cache_append(cache, &key, &value) != KV4_OK || kv4_cache_attend(cache, &args, &answer) != KV4_OK) return kv4_last_error();
  /* Attention over one token is that token's value. */
  for (int c = 0; c < DIM; ++c)
    if (out[c] != v[c]) return "the answer over one token is not its value";
  if (kv4_cache_length(cache) != 1 || kv4_cache_batch(cache) != 1 || kv4_cache_nbytes(cache) == 0) return "what the cache says of itself";
  if (kv4_cache_crop(cache, 2) != KV4_OUT_OF_RANGE || strstr(kv4_last_error(), "length: expected") == NULL) return "a crop beyond the length";
  kv4_cache_destroy(cache);
  kv4_cache_destroy(NULL);
  return NULL;
}
