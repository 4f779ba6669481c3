// Functions without a cache: versions, defaults, backends, threads, partial states.
#include <memory>
#include <string>

#include "capi/executor.h"
#include "capi/values.h"
#include "kv4/cpu.h"
#include "kv4/version.h"

namespace kv4::capi {

Status check_executor(const kv4_executor& executor) {
  if (executor.threads < 1) return invalid_argument("executor.threads", "at least 1", std::to_string(executor.threads));
  return executor.run == nullptr ? null_pointer("executor.run") : Status();
}

}  // namespace kv4::capi

using namespace kv4::capi;

extern "C" {

kv4_recipe kv4_recipe_default(void) {
  return guard(kv4_recipe{}, kv4_recipe{}, [] { return recipe_from(kv4::Recipe::kv4()); });
}
kv4_recipe kv4_recipe_paper(void) {
  return guard(kv4_recipe{}, kv4_recipe{}, [] { return recipe_from(kv4::Recipe::paper()); });
}
kv4_recipe kv4_recipe_exact(void) {
  return guard(kv4_recipe{}, kv4_recipe{}, [] { return recipe_from(kv4::Recipe::exact()); });
}

const char* kv4_version(void) { return KV4_VERSION; }
const char* kv4_last_error(void) { return last_error(); }

kv4_status kv4_cache_config_init(kv4_cache_config* config, size_t size) {
  return init_struct("config", config, size, kConfigSizes, default_config);
}
kv4_status kv4_attend_args_init(kv4_attend_args* args, size_t size) {
  return init_struct("args", args, size, kArgsSizes, default_args);
}

kv4_status kv4_set_num_threads(int32_t threads) {
  return guarded({}, [&] { return kv4::cpu::set_num_threads(threads); });
}
int32_t kv4_num_threads(void) {
  return guard(1, 1, [] { return kv4::cpu::num_threads(); });
}
kv4_status kv4_set_operand_bits(int32_t bits) {
  return guarded({}, [&] { return kv4::cpu::set_operand_bits(bits); });
}
int32_t kv4_operand_bits(void) {
  return guard(8, 8, [] { return kv4::cpu::operand_bits(); });
}
kv4_status kv4_force_isa(const char* isa) {
  return guarded({}, [&] { return kv4::cpu::force_isa(isa == nullptr ? "" : isa); });
}
const char* kv4_active_isa(void) {
  return guard("", "", [] {
    static thread_local std::string name;
    name = kv4::cpu::active_isa();
    if (name.empty()) set_last_error(kv4::cpu::check_isa());
    return name.c_str();
  });
}

const char* kv4_backends(void) {
  return guard("", "", [] {
    static thread_local std::string names;
    names.clear();
    for (const std::string& name : kv4::backends()) names += (names.empty() ? "" : ",") + name;
    return names.c_str();
  });
}
const char* kv4_why_not(const char* backend) {
  return guard("", "", [&] {
    static thread_local std::string reason;
    reason = kv4::why_not(backend == nullptr ? "" : backend);
    return reason.c_str();
  });
}

kv4_status kv4_set_executor(const kv4_executor* executor) {
  return guarded({}, [&]() -> kv4::Status {
    static thread_local std::unique_ptr<CallerExecutor> current;
    if (executor != nullptr) KV4_RETURN_IF_ERROR(check_executor(*executor));
    std::unique_ptr<CallerExecutor> next = executor == nullptr ? nullptr : std::make_unique<CallerExecutor>(*executor);
    kv4::cpu::set_executor(next.get());
    current = std::move(next);
    return {};
  });
}

kv4_status kv4_merge(float* into_o, float* into_m, float* into_l, const float* o, const float* m, const float* l,
                     int64_t rows, int32_t dim) {
  return guarded({{"into_o", into_o}, {"into_m", into_m}, {"into_l", into_l}, {"o", o}, {"m", m}, {"l", l}},
                 [&]() -> kv4::Status {
                   if (rows < 0) return kv4::invalid_argument("rows", "0 or more", std::to_string(rows));
                   if (dim < 1) return kv4::invalid_argument("dim", "1 or more", std::to_string(dim));
                   kv4::merge({into_o, into_m, into_l},
                              {const_cast<float*>(o), const_cast<float*>(m), const_cast<float*>(l)}, rows, dim);
                   return {};
                 });
}
kv4_status kv4_finish(const float* o, const float* m, const float* l, const float* sinks, const kv4_tensor* out) {
  return guarded({{"o", o}, {"m", m}, {"l", l}, {"out", out}}, [&]() -> kv4::Status {
    kv4::MutableTensorView view;
    KV4_RETURN_IF_ERROR(view_of("out", *out, &view));
    if (view.stride[3] != 1 && view.shape[3] > 1)
      return kv4::invalid_argument("out", "channel stride 1", std::to_string(view.stride[3]));
    kv4::finish({const_cast<float*>(o), const_cast<float*>(m), const_cast<float*>(l)}, sinks, view);
    return {};
  });
}

}  // extern "C"
