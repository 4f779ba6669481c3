// The process's one rotation for each definition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "rotation/rotation.h"

namespace kv4 {

class Interned {
 public:
  struct Definition {
    RotationKind kind;
    int d;
    int reflectors = 0;
    std::uint64_t seed = 0;
    std::span<const float> matrix = {};  // by its bytes
  };
  // Null where no holder of such a rotation is left.
  static std::shared_ptr<const Rotation> find(const Definition& definition);
  // `made`, from now on what find gives for its definition, or what another thread has made of the same meanwhile.
  static std::shared_ptr<const Rotation> add(std::unique_ptr<Rotation> made);
  static std::size_t count();  // rotations that somebody holds

 private:
  static Definition definition_of(const Rotation& r);
};

}  // namespace kv4
