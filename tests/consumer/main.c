/* The C ABI of an installed kv4: the attention output over one token is that token's value. */
#include <kv4/kv4.h>
#include <stdio.h>

enum { DIM = 64 };

static kv4_tensor row(float* data) {
  kv4_tensor t = {data, KV4_F32, {1, 1, 1, DIM}, {DIM, DIM, DIM, 1}};
  return t;
}

int main(void) {
  float k[DIM], v[DIM], q[DIM], out[DIM];
  for (int c = 0; c < DIM; ++c) {
    k[c] = q[c] = (float)c / DIM;
    v[c] = (float)(c - 32);
    out[c] = -1;
  }
  kv4_cache_config config;
  kv4_attend_args args;
  if (kv4_cache_config_init(&config, sizeof config) != KV4_OK || kv4_attend_args_init(&args, sizeof args) != KV4_OK) {
    fprintf(stderr, "%s\n", kv4_last_error());
    return 1;
  }
  config.kv_heads = 1;
  config.head_dim_k = config.head_dim_v = DIM;
  args.q = row(q);
  kv4_cache* cache = NULL;
  kv4_tensor key = row(k), value = row(v), answer = row(out);
  if (kv4_cache_create(&config, &cache) != KV4_OK || kv4_cache_append(cache, &key, &value) != KV4_OK ||
      kv4_cache_attend(cache, &args, &answer) != KV4_OK) {
    fprintf(stderr, "%s\n", kv4_last_error());
    return 1;
  }
  int wrong = 0;
  for (int c = 0; c < DIM; ++c) wrong += out[c] != v[c];
  wrong += kv4_cache_length(cache) != 1;
  kv4_cache_destroy(cache);
  config.kv_heads = 0;
  wrong += kv4_cache_create(&config, &cache) != KV4_INVALID_ARGUMENT;
  printf("kv4 %s from C: %d wrong; refusal: %s\n", kv4_version(), wrong, kv4_last_error());
  return wrong != 0;
}
