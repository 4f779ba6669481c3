#include "kv4/recipe.h"

#include <string>

namespace kv4 {
namespace {

constexpr int kMaxExactTokens = 1 << 24;  // window + kPageTokens stays far from overflow

Status check_side(const SideRecipe& side, const std::string& name, bool key) {
  const auto field = [&](const char* f) { return name + "." + f; };
  if (side.rotation > RotationKind::dense)
    return invalid_argument(field("rotation"), "identity, srft, srht, householder or dense",
                            std::to_string(static_cast<int>(side.rotation)));
  if (side.reflectors < 0 || side.reflectors > kMaxHeadDim)
    return invalid_argument(field("reflectors"), "0 (half the head dim) or 1 ... head dim",
                            std::to_string(side.reflectors));
  if (side.reflectors != 0 && side.rotation != RotationKind::householder)
    return invalid_argument(field("reflectors"), "0 where the rotation is not householder",
                            std::to_string(side.reflectors));
  if (side.group != 0 && side.group != 32 && side.group != 64 && side.group != 128)
    return invalid_argument(field("group"), "0 (one scale per vector), 32, 64 or 128", std::to_string(side.group));
  if (side.bits != 2 && side.bits != 3 && side.bits != 4 && side.bits != 6 && side.bits != 8)
    return invalid_argument(field("bits"), "2, 3, 4, 6 or 8", std::to_string(side.bits));
  if (side.levels > LevelKind::trellis)
    return invalid_argument(field("levels"), "lloyd_max, uniform or trellis",
                            std::to_string(static_cast<int>(side.levels)));
  if (side.levels == LevelKind::uniform && side.bits != 4)
    return invalid_argument(
        field("levels"),
        (side.bits < 4 ? "lloyd_max or trellis with " : "lloyd_max with ") + std::to_string(side.bits) + " bits",
        "uniform");
  if (side.levels == LevelKind::trellis && side.bits > 4)
    return invalid_argument(field("levels"), "lloyd_max with " + std::to_string(side.bits) + " bits", "trellis");
  if (side.scale > ScaleRule::abs_max)
    return invalid_argument(field("scale"), "least_squares or abs_max", std::to_string(static_cast<int>(side.scale)));
  if (side.levels == LevelKind::trellis && side.scale != ScaleRule::least_squares)
    return invalid_argument(field("scale"), "least_squares with trellis levels", "abs_max");
  if (side.lambda > LambdaMode::given)
    return invalid_argument(field("lambda"), key ? "none, automatic or given" : "none or given",
                            std::to_string(static_cast<int>(side.lambda)));
  if (!key && side.mean) return invalid_argument(field("mean"), "false: only keys have a page mean", "true");
  if (!key && side.lambda == LambdaMode::automatic)
    return invalid_argument(field("lambda"), "none or given: automatic lambda needs queries, so keys", "automatic");
  return {};
}

Status check_dim(const SideRecipe& side, int dim, const std::string& side_name, const char* dim_name) {
  if (dim < kMinHeadDim || dim > kMaxHeadDim || dim % 2 != 0)
    return error(StatusCode::unsupported, dim_name,
                 "an even number from " + std::to_string(kMinHeadDim) + " to " + std::to_string(kMaxHeadDim) + " for " +
                     side_name + " to be sealed (an exact recipe serves any)",
                 std::to_string(dim));
  if (side.group != 0 && dim % side.group != 0)
    return invalid_argument(side_name + ".group",
                            "0 or a divisor of " + std::string(dim_name) + " " + std::to_string(dim),
                            std::to_string(side.group));
  if (side.reflectors > dim)
    return invalid_argument(side_name + ".reflectors", "at most " + std::string(dim_name) + " " + std::to_string(dim),
                            std::to_string(side.reflectors));
  return {};
}

}  // namespace

Recipe Recipe::trellis() {
  Recipe r;
  r.key.levels = r.value.levels = LevelKind::trellis;
  return r;
}

Recipe Recipe::exact() {
  Recipe r;
  r.key = SideRecipe{.rotation = RotationKind::identity};
  r.value = SideRecipe{.rotation = RotationKind::identity};
  r.seal = SealMode::never;
  r.sinks = 0;
  r.window = 0;
  return r;
}

// arXiv 2605.05699: SRFT, uniform int4 with an abs-max scale per vector, every vector as it arrives.
Recipe Recipe::paper() {
  Recipe r;
  r.key = SideRecipe{.levels = LevelKind::uniform, .scale = ScaleRule::abs_max};
  r.value = r.key;
  r.seal = SealMode::arrival;
  r.sinks = 0;
  r.window = 0;
  return r;
}

Status validate(const Recipe& recipe) {
  KV4_RETURN_IF_ERROR(check_side(recipe.key, "recipe.key", true));
  KV4_RETURN_IF_ERROR(check_side(recipe.value, "recipe.value", false));
  if (recipe.seal > SealMode::never)
    return invalid_argument("recipe.seal", "page, arrival or never", std::to_string(static_cast<int>(recipe.seal)));
  const auto tokens = [](const char* field, int n) -> Status {
    if (n < 0 || n > kMaxExactTokens)
      return invalid_argument(field, "0 ... " + std::to_string(kMaxExactTokens) + " tokens", std::to_string(n));
    return {};
  };
  KV4_RETURN_IF_ERROR(tokens("recipe.sinks", recipe.sinks));
  KV4_RETURN_IF_ERROR(tokens("recipe.window", recipe.window));
  if (recipe.refined < 0 || recipe.refined > kMostRefined)
    return invalid_argument("recipe.refined", "0 to " + std::to_string(kMostRefined) + " keys of a page",
                            std::to_string(recipe.refined));
  if (recipe.seal == SealMode::arrival) {
    if (recipe.key.mean)
      return invalid_argument("recipe.key.mean", "false with arrival sealing, which knows one vector at a time",
                              "true");
    if (recipe.key.lambda == LambdaMode::automatic)
      return invalid_argument("recipe.key.lambda", "none or given with arrival sealing, which precedes every query",
                              "automatic");
    if (recipe.sinks != 0)
      return invalid_argument("recipe.sinks", "0 with arrival sealing, which keeps no token exact",
                              std::to_string(recipe.sinks));
    if (recipe.window != 0)
      return invalid_argument("recipe.window", "0 with arrival sealing, which keeps no token exact",
                              std::to_string(recipe.window));
    for (const auto& [side, name] :
         {std::pair(&recipe.key, "recipe.key.levels"), {&recipe.value, "recipe.value.levels"}})
      if (side->levels == LevelKind::trellis)
        return invalid_argument(
            name, "lloyd_max or uniform with arrival sealing, which never has a page's tokens side by side", "trellis");
    if (recipe.refined != 0)
      return invalid_argument("recipe.refined", "0 with arrival sealing, which never has a page's tokens side by side",
                              std::to_string(recipe.refined));
  }
  return {};
}

Status validate(const Recipe& recipe, int head_dim_k, int head_dim_v) {
  KV4_RETURN_IF_ERROR(validate(recipe));
  if (head_dim_k < 1) return invalid_argument("head_dim_k", "a positive number", std::to_string(head_dim_k));
  if (head_dim_v < 1) return invalid_argument("head_dim_v", "a positive number", std::to_string(head_dim_v));
  if (recipe.seal == SealMode::never) return {};
  KV4_RETURN_IF_ERROR(check_dim(recipe.key, head_dim_k, "recipe.key", "head_dim_k"));
  KV4_RETURN_IF_ERROR(check_dim(recipe.value, head_dim_v, "recipe.value", "head_dim_v"));
  return {};
}

}  // namespace kv4
