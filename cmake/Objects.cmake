# KV4_OBJECTS names a build folder of this library, the Python module's for one: its object files are taken in place of compiling
# the same sources with the same options again. They stay up to date, since every build here begins with one there.
# Out: KV4_COMPILED, the sources that are compiled here, and KV4_GIVEN_OBJECTS.

set(KV4_COMPILED ${KV4_SOURCES})
if(NOT KV4_OBJECTS)
  return()
endif()
cmake_path(ABSOLUTE_PATH KV4_OBJECTS BASE_DIRECTORY ${PROJECT_SOURCE_DIR})
if(NOT EXISTS ${KV4_OBJECTS}/CMakeCache.txt)
  message(STATUS "KV4_OBJECTS is not used: there is no build in ${KV4_OBJECTS}")
  return()
endif()
load_cache(${KV4_OBJECTS} READ_WITH_PREFIX KV4_THERE_
           CMAKE_BUILD_TYPE CMAKE_CXX_COMPILER CMAKE_CXX_FLAGS CMAKE_GENERATOR kv4_SOURCE_DIR
           BUILD_SHARED_LIBS KV4_OPENMP KV4_CPU_FEW_ISAS KV4_WERROR KV4_FUZZ KV4_SANITIZE)
foreach(name IN ITEMS CMAKE_BUILD_TYPE CMAKE_CXX_COMPILER CMAKE_CXX_FLAGS CMAKE_GENERATOR kv4_SOURCE_DIR
                      BUILD_SHARED_LIBS KV4_OPENMP KV4_CPU_FEW_ISAS KV4_WERROR KV4_FUZZ KV4_SANITIZE)
  if(NOT "${KV4_THERE_${name}}" STREQUAL "${${name}}")
    message(STATUS "KV4_OBJECTS is not used: ${name} is \"${KV4_THERE_${name}}\" there and \"${${name}}\" here")
    return()
  endif()
endforeach()

# The registry depends on the backends that are built.
list(FILTER KV4_COMPILED INCLUDE REGEX "/src/backend/registry\\.cpp$")
foreach(source IN LISTS KV4_SOURCES)
  if(source IN_LIST KV4_COMPILED)
    continue()
  endif()
  cmake_path(RELATIVE_PATH source BASE_DIRECTORY ${PROJECT_SOURCE_DIR})
  list(APPEND KV4_GIVEN_OBJECTS ${KV4_OBJECTS}/CMakeFiles/kv4.dir/${source}.o)
endforeach()
set_source_files_properties(${KV4_GIVEN_OBJECTS} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
add_custom_target(kv4_given_objects COMMAND ${CMAKE_COMMAND} --build ${KV4_OBJECTS} --target kv4
                  BYPRODUCTS ${KV4_GIVEN_OBJECTS} COMMENT "Objects of libkv4 in ${KV4_OBJECTS}" USES_TERMINAL VERBATIM)
message(STATUS "Objects of libkv4 are those of ${KV4_OBJECTS}")
