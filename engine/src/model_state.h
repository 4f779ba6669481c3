// What a model holds.
#pragma once

#include <memory>

#include "architecture.h"
#include "config.h"
#include "kv4_engine/model.h"
#include "kv4_engine/vocabulary.h"
#include "weights.h"

namespace kv4::engine {

struct Model::State {
  std::string path;
  std::uint64_t identity = 0;
  Config config;
  const Architecture* architecture = nullptr;
  std::unique_ptr<Weights> weights;
  std::unique_ptr<Vocabulary> vocabulary;
};

}  // namespace kv4::engine
