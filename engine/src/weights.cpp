#include "weights.h"

#include <algorithm>
#include <set>

#include "kv4_engine/memory.h"
#include "log.h"

namespace kv4::engine {
namespace {

constexpr std::int64_t kTokens = 512;  // of the product that a buffer type is asked about

std::string shape_text(const std::int64_t* ne, int dims) {
  std::string text = "[";
  for (int i = 0; i < dims; ++i) text += (i > 0 ? ", " : "") + std::to_string(ne[i]);
  return text + "]";
}

// The CPU backend's buffer types, those of special kernels first.
std::vector<ggml_backend_buffer_type_t> buffer_types(ggml_backend_dev_t device) {
  std::vector<ggml_backend_buffer_type_t> types;
  const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (extra != nullptr)
    for (ggml_backend_buffer_type_t* t = extra(device); t != nullptr && *t != nullptr; ++t) types.push_back(*t);
  types.push_back(ggml_backend_dev_buffer_type(device));
  return types;
}

// Whether `device` computes what `wanted` is used for, with the weight in a buffer of `type`.
bool serves(ggml_backend_dev_t device, ggml_backend_buffer_type_t type, ggml_tensor* weight, Use use) {
  const GgmlContext context = describe(4);
  ggml_tensor* op = nullptr;
  switch (use) {
    case Use::multiply:
      op = ggml_mul_mat(context.get(), weight, ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, weight->ne[0], kTokens));
      break;
    case Use::rows:
      op = ggml_get_rows(context.get(), weight, ggml_new_tensor_1d(context.get(), GGML_TYPE_I32, kTokens));
      break;
    case Use::plain:
      op = ggml_add(context.get(), ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, weight->ne[0], kTokens), weight);
      break;
  }
  // An empty buffer only carries the type.
  const GgmlBuffer buffer(ggml_backend_buft_alloc_buffer(type, 0));
  weight->buffer = buffer.get();
  const bool result = ggml_backend_dev_supports_op(device, op);
  weight->buffer = nullptr;
  return result;
}

}  // namespace

Status Weights::load(const GgufFile& file, const std::vector<Wanted>& wanted, const std::function<void(double)>& progress,
                     std::unique_ptr<Weights>* out) {
  const LogCapture log;
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (device == nullptr) return error(StatusCode::unsupported, "ggml", "a CPU backend", "none");
  auto result = std::unique_ptr<Weights>(new Weights);
  for (ggml_backend_buffer_type_t type : buffer_types(device))
    result->places_.push_back({type, describe(wanted.size()), nullptr});

  std::vector<std::pair<std::string, ggml_tensor*>> order;  // source in the file, tensor
  std::uint64_t total = 0;
  std::set<std::string> known;
  for (const Wanted& w : wanted) {
    const std::string& source = w.source.empty() ? w.name : w.source;
    known.insert(source);
    const ggml_tensor* in_file = file.tensor(source);
    if (in_file == nullptr) {
      if (w.optional) continue;
      return invalid_argument(source, "a tensor of shape " + shape_text(w.shape.data(), static_cast<int>(w.shape.size())), "none of this name");
    }
    for (int i = 0; i < GGML_MAX_DIMS; ++i)
      if (in_file->ne[i] != (i < static_cast<int>(w.shape.size()) ? w.shape[static_cast<std::size_t>(i)] : 1))
        return invalid_argument(source, "shape " + shape_text(w.shape.data(), static_cast<int>(w.shape.size())),
                                shape_text(in_file->ne, ggml_n_dims(in_file)));
    if (w.use == Use::plain && in_file->type != GGML_TYPE_F32)
      return error(StatusCode::unsupported, source, "f32", ggml_type_name(in_file->type));
    const auto place = std::find_if(result->places_.begin(), result->places_.end(), [&](const Place& p) {
      const GgmlContext context = describe(1);
      ggml_tensor* probe = ggml_new_tensor(context.get(), in_file->type, GGML_MAX_DIMS, in_file->ne);
      return serves(device, p.type, probe, w.use);
    });
    if (place == result->places_.end())
      return error(StatusCode::unsupported, source, "a type that ggml's CPU backend computes with", ggml_type_name(in_file->type));
    ggml_tensor* t = ggml_new_tensor(place->context.get(), in_file->type, GGML_MAX_DIMS, in_file->ne);
    ggml_set_name(t, w.name.c_str());
    result->tensors_[w.name] = t;
    order.emplace_back(source, t);
    total += ggml_nbytes(t);
  }

  for (const std::string& name : file.tensor_names()) {
    if (known.contains(name)) continue;
    const ggml_tensor* t = file.tensor(name);
    return error(StatusCode::unsupported, name, "tensors that the engine computes with", "one of shape " + shape_text(t->ne, ggml_n_dims(t)) + " that it does not know");
  }
  KV4_RETURN_IF_ERROR(check_memory("model", total));
  for (Place& p : result->places_) {
    if (ggml_get_first_tensor(p.context.get()) == nullptr) continue;
    p.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(p.context.get(), p.type));
    if (!p.buffer) return error(StatusCode::out_of_memory, "model", std::to_string(total) + " free bytes", "none");
    ggml_backend_buffer_set_usage(p.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  }
  std::uint64_t done = 0;
  for (const auto& [source, tensor] : order) {
    KV4_RETURN_IF_ERROR(file.read(source, tensor));
    done += ggml_nbytes(tensor);
    if (progress) progress(static_cast<double>(done) / static_cast<double>(total));
  }
  *out = std::move(result);
  return {};
}

std::size_t Weights::nbytes() const {
  std::size_t bytes = 0;
  for (const Place& p : places_)
    if (p.buffer) bytes += ggml_backend_buffer_get_size(p.buffer.get());
  return bytes;
}

}  // namespace kv4::engine
