// Recipes as the Python package writes them: JSON, {"format": "kv4-recipe", "version": 1, "key": {...}, "value": {...}, ...}.
#pragma once

#include <string>

#include "kv4/recipe.h"
#include "kv4/status.h"

namespace kv4::run {

// Errors: invalid_argument for a file that cannot be read or is no recipe, naming the entry; those of validate().
Status read_recipe(const std::string& path, Recipe* out);

}  // namespace kv4::run
