#include "recipe_file.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

namespace kv4::run {
namespace {

using nlohmann::json;

template <class T>
using Names = std::vector<std::pair<const char*, T>>;

// Takes entries out of an object and remembers the first that is wrong.
class Entries {
 public:
  Entries(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail(where_, "an object", object.type_name());
  }

  template <class T>
  void name(const char* key, const Names<T>& names, T* out) {
    const json* value = find(key);
    if (value == nullptr) return;
    std::string known;
    for (const auto& [text, meaning] : names) {
      if (value->is_string() && value->get<std::string>() == text) {
        *out = meaning;
        return;
      }
      known += (known.empty() ? "" : ", ") + std::string(text);
    }
    fail(path(key), "one of " + known, value->dump());
  }
  template <class T>
  void integer(const char* key, T* out) {
    const json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_number_integer() || (value->is_number_unsigned() ? value->get<std::uint64_t>() > std::numeric_limits<T>::max()
                                                                    : value->get<std::int64_t>() < 0))
      return fail(path(key), "an integer of 0 or more", value->dump());
    *out = value->get<T>();
  }
  void boolean(const char* key, bool* out) {
    const json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_boolean()) return fail(path(key), "true or false", value->dump());
    *out = value->get<bool>();
  }
  const json* object(const char* key) { return find(key); }
  void text(const char* key, const std::string& expected) {
    const json* value = find(key);
    if (value == nullptr || !value->is_string() || value->get<std::string>() != expected)
      fail(path(key), expected, value == nullptr ? "nothing" : value->dump());
  }

  Status end() {
    for (auto it = object_.begin(); status_.ok() && object_.is_object() && it != object_.end(); ++it)
      if (std::find(asked_.begin(), asked_.end(), it.key()) == asked_.end()) fail(path(it.key().c_str()), "a known entry", "an unknown one");
    return status_;
  }

 private:
  const json* find(const char* key) {
    asked_.emplace_back(key);
    if (!object_.is_object()) return nullptr;
    const auto it = object_.find(key);
    return it == object_.end() ? nullptr : &*it;
  }
  std::string path(const char* key) const { return where_ + "." + key; }
  void fail(const std::string& where, const std::string& expected, const std::string& got) {
    if (status_.ok()) status_ = invalid_argument(where, expected, got);
  }
  const json& object_;
  std::string where_;
  std::vector<std::string> asked_;
  Status status_;
};

Status read_side(const json& object, const std::string& where, SideRecipe* side) {
  Entries e(object, where);
  e.name<RotationKind>("rotation",
                       {{"srft", RotationKind::srft}, {"srht", RotationKind::srht}, {"householder", RotationKind::householder}, {"identity", RotationKind::identity}},
                       &side->rotation);
  e.integer("reflectors", &side->reflectors);
  e.integer("seed", &side->seed);
  e.integer("group", &side->group);
  e.name<LevelKind>("levels", {{"lloyd_max", LevelKind::lloyd_max}, {"uniform", LevelKind::uniform}}, &side->levels);
  e.name<ScaleRule>("scale", {{"least_squares", ScaleRule::least_squares}, {"abs_max", ScaleRule::abs_max}}, &side->scale);
  e.boolean("mean", &side->mean);
  e.name<LambdaMode>("lambda_", {{"none", LambdaMode::none}, {"auto", LambdaMode::automatic}}, &side->lambda);
  return e.end();
}

}  // namespace

Status read_recipe(const std::string& path, Recipe* out) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return invalid_argument("recipe", "a file that can be read", path);
  const json data = json::parse(file, nullptr, false);
  if (data.is_discarded()) return invalid_argument("recipe", "a recipe in JSON", path);
  Recipe recipe;
  Entries e(data, "recipe");
  e.text("format", "kv4-recipe");
  int version = 0;
  e.integer("version", &version);
  e.name<SealMode>("seal", {{"page", SealMode::page}, {"arrival", SealMode::arrival}, {"never", SealMode::never}}, &recipe.seal);
  e.integer("sinks", &recipe.sinks);
  e.integer("window", &recipe.window);
  const json* key = e.object("key");
  const json* value = e.object("value");
  KV4_RETURN_IF_ERROR(e.end());
  if (version != 1) return invalid_argument("recipe.version", "1", std::to_string(version));
  if (key != nullptr) KV4_RETURN_IF_ERROR(read_side(*key, "recipe.key", &recipe.key));
  if (value != nullptr) KV4_RETURN_IF_ERROR(read_side(*value, "recipe.value", &recipe.value));
  KV4_RETURN_IF_ERROR(validate(recipe));
  *out = recipe;
  return {};
}

}  // namespace kv4::run
