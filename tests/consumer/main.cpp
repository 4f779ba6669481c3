// The C++ API of an installed kv4: its headers stand alone and its symbols link.
#include <kv4/cache.h>
#include <kv4/cpu.h>
#include <kv4/version.h>

#include <iostream>

int main() {
  kv4::CacheConfig config;
  config.kv_heads = 2;
  config.head_dim_k = config.head_dim_v = 128;
  std::unique_ptr<kv4::Cache> cache;
  const kv4::Status status = kv4::Cache::create(config, &cache);
  std::cout << "kv4 " << KV4_VERSION << " from C++ on " << kv4::cpu::active_isa() << ": "
            << (status.ok() ? "created" : status.message()) << "\n";
  return status.ok() && cache->length() == 0 ? 0 : 1;
}
