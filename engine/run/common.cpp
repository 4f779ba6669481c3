// What all commands share.
#include <filesystem>
#include <fstream>
#include <iterator>

#include "options.h"
#include "recipe_file.h"
#include "terminal.h"

namespace kv4::run {

Status recipe_of(const Common& common, Recipe* out) {
  *out = common.cache == "exact" ? Recipe::exact() : Recipe::kv4();
  if (common.recipe.empty()) return {};
  if (common.cache != "kv4") return invalid_argument("--recipe", "--cache kv4", common.cache);
  KV4_RETURN_IF_ERROR(check_file("--recipe", common.recipe));
  return read_recipe(common.recipe, out);
}

Status load_model(const Common& common, std::shared_ptr<const engine::Model>* out) {
  Bar bar("loading", !common.json);
  return engine::Model::load(common.model, [&](double share) { bar.show(share); }, out);
}

Status make_context(const Common& common, std::shared_ptr<const engine::Model> model, std::int64_t context, std::unique_ptr<engine::Context>* out) {
  engine::ContextOptions options;
  options.cache = common.cache == "f16" ? engine::CacheKind::f16 : engine::CacheKind::kv4;
  KV4_RETURN_IF_ERROR(recipe_of(common, &options.recipe));
  options.context = common.context > 0 ? common.context : context;
  options.threads = common.threads;
  if (common.batch > 0) options.batch = common.batch;
  return engine::Context::create(std::move(model), options, out);
}

Status check_file(const std::string& argument, const std::string& path) {
  std::error_code unused;
  if (std::filesystem::is_directory(path, unused)) return invalid_argument(argument, "a file that can be read", path + ", a folder");
  if (!std::ifstream(path, std::ios::binary)) return invalid_argument(argument, "a file that can be read", path);
  return {};
}

Status read_text(const std::string& argument, const std::string& path, std::string* out) {
  KV4_RETURN_IF_ERROR(check_file(argument, path));
  std::ifstream file(path, std::ios::binary);
  out->assign(std::istreambuf_iterator<char>(file), {});
  if (file.bad()) return invalid_argument(argument, "a file that can be read", path);
  return {};
}

}  // namespace kv4::run
