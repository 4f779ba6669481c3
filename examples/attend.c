/* kv4 from C: tokens into a cache, and attention over them.
 *
 *   cc attend.c $(pkg-config --cflags --libs kv4) -o attend
 */
#include <kv4/kv4.h>
#include <stdio.h>
#include <stdlib.h>

enum { KV_HEADS = 2, HEADS = 8, DIM = 64, PROMPT = 300 };

/* [1, heads, tokens, DIM], contiguous. */
static kv4_tensor tensor(float* data, int64_t heads, int64_t tokens) {
  kv4_tensor t = {data, KV4_F32, {1, heads, tokens, DIM}, {heads * tokens * DIM, tokens * DIM, DIM, 1}};
  return t;
}

static void fill(float* x, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

static void check(kv4_status status) {
  if (status == KV4_OK) return;
  fprintf(stderr, "%s\n", kv4_last_error());
  exit(1);
}

int main(void) {
  static float k[KV_HEADS * PROMPT * DIM], v[KV_HEADS * PROMPT * DIM], q[HEADS * DIM], out[HEADS * DIM];
  fill(k, sizeof k / sizeof *k);
  fill(v, sizeof v / sizeof *v);
  fill(q, sizeof q / sizeof *q);

  kv4_cache_config config;
  check(kv4_cache_config_init(&config, sizeof config));
  config.kv_heads = KV_HEADS;
  config.head_dim_k = config.head_dim_v = DIM;
  kv4_cache* cache = NULL;
  check(kv4_cache_create(&config, &cache));

  const kv4_tensor keys = tensor(k, KV_HEADS, PROMPT), values = tensor(v, KV_HEADS, PROMPT);
  check(kv4_cache_append(cache, &keys, &values));

  kv4_attend_args args;
  check(kv4_attend_args_init(&args, sizeof args));
  args.q = tensor(q, HEADS, 1); /* the newest token's queries */
  const kv4_tensor answer = tensor(out, HEADS, 1);
  check(kv4_cache_attend(cache, &args, &answer));
  check(kv4_cache_seal(cache)); /* what has left the exact window becomes 4 bits now */
  printf("kv4 %s: %lld tokens in %zu bytes, %zu in float32; out[0] = %.4f\n", kv4_version(),
         (long long)kv4_cache_length(cache), kv4_cache_nbytes(cache), sizeof k + sizeof v, out[0]);
  kv4_cache_destroy(cache);
  return 0;
}
