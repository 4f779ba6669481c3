#include "gguf_file.h"

#include <algorithm>
#include <filesystem>
#include <limits>

#include "hash.h"
#include "log.h"

namespace kv4::engine {
namespace {

constexpr std::size_t kChunk = 16u << 20;

Status damaged(const std::string& path, const std::string& what) { return invalid_argument("model", "a whole GGUF file", path + ": " + what); }

}  // namespace

Status GgufFile::open(const std::string& path, std::unique_ptr<GgufFile>* out) {
  auto result = std::unique_ptr<GgufFile>(new GgufFile);
  result->path_ = path;
  std::error_code unused;
  if (std::filesystem::is_directory(path, unused)) return invalid_argument("model", "a GGUF file that can be read", path + ", a folder");
  result->file_.reset(std::fopen(path.c_str(), "rb"));
  if (!result->file_) return invalid_argument("model", "a GGUF file that can be read", path);
  char magic[4] = {};
  if (std::fread(magic, 1, 4, result->file_.get()) != 4 || !std::equal(magic, magic + 4, "GGUF"))
    return damaged(path, "it does not begin with GGUF");
  if (fseeko(result->file_.get(), 0, SEEK_END) != 0) return damaged(path, "its length cannot be found");
  result->bytes_ = static_cast<std::uint64_t>(ftello(result->file_.get()));

  const LogCapture log;
  ggml_context* tensors = nullptr;
  result->gguf_.reset(gguf_init_from_file(path.c_str(), {.no_alloc = true, .ctx = &tensors}));
  result->tensors_.reset(tensors);
  if (!result->gguf_) return damaged(path, log.last().empty() ? "its header cannot be read" : log.last());
  const gguf_context* g = result->gguf_.get();
  const std::uint64_t data = gguf_get_data_offset(g);
  for (std::int64_t i = 0; i < gguf_get_n_tensors(g); ++i) {
    const std::uint64_t end = data + gguf_get_tensor_offset(g, i) + gguf_get_tensor_size(g, i);
    if (end > result->bytes_)
      return damaged(path, std::string(gguf_get_tensor_name(g, i)) + " ends at byte " + std::to_string(end) + " of " +
                               std::to_string(result->bytes_));
  }
  *out = std::move(result);
  return {};
}

Status GgufFile::text(const std::string& key, std::string* out) const {
  const std::int64_t id = find(key);
  if (id < 0) return invalid_argument(key, "a string in the model's metadata", "no such key");
  const gguf_type type = gguf_get_kv_type(gguf_.get(), id);
  if (type != GGUF_TYPE_STRING) return invalid_argument(key, "a string", gguf_type_name(type));
  *out = gguf_get_val_str(gguf_.get(), id);
  return {};
}

Status GgufFile::integer(const std::string& key, std::int64_t* out) const {
  const gguf_context* g = gguf_.get();
  const std::int64_t id = find(key);
  if (id < 0) return invalid_argument(key, "an integer in the model's metadata", "no such key");
  switch (const gguf_type type = gguf_get_kv_type(g, id)) {
    case GGUF_TYPE_UINT8: *out = gguf_get_val_u8(g, id); return {};
    case GGUF_TYPE_INT8: *out = gguf_get_val_i8(g, id); return {};
    case GGUF_TYPE_UINT16: *out = gguf_get_val_u16(g, id); return {};
    case GGUF_TYPE_INT16: *out = gguf_get_val_i16(g, id); return {};
    case GGUF_TYPE_UINT32: *out = gguf_get_val_u32(g, id); return {};
    case GGUF_TYPE_INT32: *out = gguf_get_val_i32(g, id); return {};
    case GGUF_TYPE_INT64: *out = gguf_get_val_i64(g, id); return {};
    case GGUF_TYPE_UINT64: {
      const std::uint64_t value = gguf_get_val_u64(g, id);
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        return invalid_argument(key, "an integer below 2^63", std::to_string(value));
      *out = static_cast<std::int64_t>(value);
      return {};
    }
    default: return invalid_argument(key, "an integer", gguf_type_name(type));
  }
}

Status GgufFile::real(const std::string& key, double* out) const {
  const gguf_context* g = gguf_.get();
  const std::int64_t id = find(key);
  if (id < 0) return invalid_argument(key, "a number in the model's metadata", "no such key");
  switch (const gguf_type type = gguf_get_kv_type(g, id)) {
    case GGUF_TYPE_FLOAT32: *out = gguf_get_val_f32(g, id); return {};
    case GGUF_TYPE_FLOAT64: *out = gguf_get_val_f64(g, id); return {};
    default: return invalid_argument(key, "a floating-point number", gguf_type_name(type));
  }
}

Status GgufFile::number(const std::string& key, double* out) const {
  const gguf_context* g = gguf_.get();
  const std::int64_t id = find(key);
  if (id >= 0 && gguf_get_kv_type(g, id) == GGUF_TYPE_BOOL) {
    *out = gguf_get_val_bool(g, id) ? 1 : 0;
    return {};
  }
  if (real(key, out).ok()) return {};
  std::int64_t value = 0;
  KV4_RETURN_IF_ERROR(integer(key, &value));
  *out = static_cast<double>(value);
  return {};
}

std::vector<std::string> GgufFile::unasked(const std::string& prefix) const {
  std::vector<std::string> keys;
  for (std::int64_t i = 0; i < gguf_get_n_kv(gguf_.get()); ++i) {
    const std::string key = gguf_get_key(gguf_.get(), i);
    if (key.starts_with(prefix) && !asked_.contains(key)) keys.push_back(key);
  }
  return keys;
}

std::vector<std::string> GgufFile::tensor_names() const {
  std::vector<std::string> names;
  for (std::int64_t i = 0; i < gguf_get_n_tensors(gguf_.get()); ++i) names.emplace_back(gguf_get_tensor_name(gguf_.get(), i));
  return names;
}

Status GgufFile::read(const std::string& name, ggml_tensor* target) const {
  const std::int64_t id = gguf_find_tensor(gguf_.get(), name.c_str());
  if (id < 0) return invalid_argument(name, "a tensor of the model", "none of this name");
  const std::size_t bytes = gguf_get_tensor_size(gguf_.get(), id);
  const std::uint64_t offset = gguf_get_data_offset(gguf_.get()) + gguf_get_tensor_offset(gguf_.get(), id);
  if (fseeko(file_.get(), static_cast<off_t>(offset), SEEK_SET) != 0) return damaged(path_, name + " cannot be read");
  const auto fill = [&](void* to, std::size_t count) { return std::fread(to, 1, count, file_.get()) == count; };
  if (ggml_backend_buffer_is_host(target->buffer)) {
    if (!fill(target->data, bytes)) return damaged(path_, name + " cannot be read");
    return {};
  }
  // A buffer with an order of its own takes a tensor whole.
  std::vector<std::byte> staging(bytes);
  if (!fill(staging.data(), bytes)) return damaged(path_, name + " cannot be read");
  ggml_backend_tensor_set(target, staging.data(), 0, bytes);
  return {};
}

Status GgufFile::identity(std::uint64_t* out) const {
  const gguf_context* g = gguf_.get();
  Fnv fnv;
  fnv.add(&bytes_, sizeof bytes_);
  std::vector<char> piece(kChunk);
  const auto add = [&](std::uint64_t offset, std::uint64_t count) {
    if (fseeko(file_.get(), static_cast<off_t>(offset), SEEK_SET) != 0) return false;
    while (count > 0) {
      const std::size_t now = static_cast<std::size_t>(std::min<std::uint64_t>(count, piece.size()));
      if (std::fread(piece.data(), 1, now, file_.get()) != now) return false;
      fnv.add(piece.data(), now);
      count -= now;
    }
    return true;
  };
  const std::uint64_t data = gguf_get_data_offset(g);
  if (!add(0, data)) return damaged(path_, "its header cannot be read");  // names, types, shapes and offsets included
  for (std::int64_t i = 0; i < gguf_get_n_tensors(g); ++i)
    if (!add(data + gguf_get_tensor_offset(g, i), std::min<std::uint64_t>(1024, gguf_get_tensor_size(g, i))))
      return damaged(path_, std::string(gguf_get_tensor_name(g, i)) + " cannot be read");
  *out = fnv.value;
  return {};
}

}  // namespace kv4::engine
