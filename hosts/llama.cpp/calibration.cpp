#include "calibration.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string_view>

namespace kv4::llama {
namespace {

using Json = nlohmann::json;

Status refused(const std::string& expected, const std::string& got) {
  return invalid_argument("KV4_CALIBRATION", expected, got);
}

std::string text_of(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "none";
}

// "layer.3.key.lambda": the layer, and whose it is; false for any other name.
bool parse_name(const std::string& name, int* layer, bool* of_keys) {
  int n = 0;
  char side[8] = {};
  if (std::sscanf(name.c_str(), "layer.%d.%7[a-z].lambda%n", layer, side, &n) != 2 ||
      n != static_cast<int>(name.size()) || *layer < 0)
    return false;
  *of_keys = std::string_view(side) == "key";
  return *of_keys || std::string_view(side) == "value";
}

// One tensor's entry of the header, and its numbers from what follows the header.
Status parse_tensor(const std::string& name, const Json& entry, std::string_view data, Lambda* out) {
  const bool whole =
      entry.is_object() && text_of(entry, "dtype") == "F32" && entry.contains("shape") && entry["shape"].is_array() &&
      entry["shape"].size() == 2 && entry.contains("data_offsets") && entry["data_offsets"].is_array() &&
      entry["data_offsets"].size() == 2 &&
      std::all_of(entry["shape"].begin(), entry["shape"].end(), [](const Json& x) { return x.is_number_unsigned(); }) &&
      std::all_of(entry["data_offsets"].begin(), entry["data_offsets"].end(),
                  [](const Json& x) { return x.is_number_unsigned(); });
  if (!whole)
    return refused("float32 [kv_heads, head_dim] as " + name,
                   entry.dump(-1, ' ', true, Json::error_handler_t::replace));
  const auto heads = entry["shape"][0].get<std::uint64_t>(), dim = entry["shape"][1].get<std::uint64_t>();
  const auto begin = entry["data_offsets"][0].get<std::uint64_t>(), end = entry["data_offsets"][1].get<std::uint64_t>();
  if (heads == 0 || dim == 0 || heads > 1 << 16 || dim > 1 << 16 || begin > end || end > data.size() ||
      end - begin != heads * dim * sizeof(float))
    return refused("a whole file", "one whose " + name + " leads out of it");
  out->kv_heads = static_cast<std::int64_t>(heads);
  out->head_dim = static_cast<std::int64_t>(dim);
  out->values.resize(heads * dim);
  std::memcpy(out->values.data(), data.data() + begin, end - begin);
  for (const float x : out->values)
    if (!std::isfinite(x) || x <= 0) return refused("positive numbers", std::to_string(x) + " in " + name);
  return {};
}

Status find(const std::map<int, Lambda>& side, const char* whose, int layer, std::int64_t kv_heads,
            std::int64_t head_dim, std::vector<float>* out) {
  const auto found = side.find(layer);
  const auto shape = [](std::int64_t a, std::int64_t b) {
    return std::string("[").append(std::to_string(a)).append(", ").append(std::to_string(b)).append("]");
  };
  if (found != side.end() && found->second.kv_heads == kv_heads && found->second.head_dim == head_dim) {
    *out = found->second.values;
    return {};
  }
  return refused(std::string("this model's lambda of ") + whose + ", " + shape(kv_heads, head_dim) + " for this layer",
                 found == side.end() ? "none" : shape(found->second.kv_heads, found->second.head_dim));
}

}  // namespace

Status Calibration::read(const std::string& path, Calibration* out) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file || bytes.empty()) return refused("a file that can be read", path);
  return parse(bytes, path, out);
}

Status Calibration::parse(std::string_view bytes, const std::string& path, Calibration* out) {
  std::uint64_t size = 0;
  if (bytes.size() >= sizeof size) std::memcpy(&size, bytes.data(), sizeof size);
  const Json header = size == 0 || size > bytes.size() - sizeof size
                          ? Json()
                          : Json::parse(bytes.data() + sizeof size, bytes.data() + sizeof size + size, nullptr, false);
  if (!header.is_object()) return refused("a safetensors file", path);
  const Json meta = header.value("__metadata__", Json::object());
  if (!meta.is_object() || text_of(meta, "format") != "kv4-calibration" || text_of(meta, "version") != "1")
    return refused("version 1 of kv4-calibration, as `kv4 calibrate` writes it",
                   meta.is_object() ? text_of(meta, "format") + ", version " + text_of(meta, "version") : path);
  const std::string_view data = bytes.substr(sizeof size + size);
  Calibration read;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__" || name.ends_with(".moments")) continue;
    int layer = 0;
    bool of_keys = false;
    if (!parse_name(name, &layer, &of_keys)) return refused("lambda alone, of `kv4 calibrate --method lambda`", name);
    KV4_RETURN_IF_ERROR(parse_tensor(name, entry, data, &(of_keys ? read.keys_ : read.values_)[layer]));
  }
  if (read.keys_.empty()) return refused("lambda of keys", "none");
  *out = std::move(read);
  return {};
}

Status Calibration::keys_of(int layer, std::int64_t kv_heads, std::int64_t head_dim, std::vector<float>* out) const {
  return find(keys_, "keys", layer, kv_heads, head_dim, out);
}

Status Calibration::values_of(int layer, std::int64_t kv_heads, std::int64_t head_dim, std::vector<float>* out) const {
  return find(values_, "values", layer, kv_heads, head_dim, out);
}

void pair_neighbours(std::vector<float>* lambda, std::int64_t head_dim, std::int64_t n) {
  std::vector<float> row(static_cast<std::size_t>(n));
  for (auto head = lambda->begin(); head != lambda->end(); head += head_dim) {
    for (std::int64_t c = 0; c < n / 2; ++c) {
      row[static_cast<std::size_t>(2 * c)] = head[c];
      row[static_cast<std::size_t>(2 * c + 1)] = head[c + n / 2];
    }
    std::copy(row.begin(), row.begin() + n / 2 * 2, head);
  }
}

}  // namespace kv4::llama
