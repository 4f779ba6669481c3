# kv4._core: the bindings, as one module beside the package's Python files.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module OPTIONAL_COMPONENTS ${SKBUILD_SABI_COMPONENT})
find_package(nanobind CONFIG QUIET)
if(NOT nanobind_FOUND)
  execute_process(COMMAND ${Python_EXECUTABLE} -m nanobind --cmake_dir
                  OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  find_package(nanobind CONFIG REQUIRED)
endif()

file(GLOB KV4_BINDINGS CONFIGURE_DEPENDS python/bindings/*.cpp)
# The stable ABI where the wheel is for it: CPython 3.12 and later.
if(SKBUILD_SABI_COMPONENT)
  set(KV4_STABLE_ABI STABLE_ABI)
endif()
nanobind_add_module(_core ${KV4_STABLE_ABI} NB_STATIC NOMINSIZE ${KV4_BINDINGS})
target_compile_options(_core PRIVATE ${KV4_WARNINGS})
# nanobind's own errors are put in our words (python/bindings/errors.cpp).
get_target_property(KV4_NANOBIND _core LINK_LIBRARIES)
list(FILTER KV4_NANOBIND INCLUDE REGEX "^nanobind-static")
target_compile_definitions(${KV4_NANOBIND} PRIVATE PyErr_SetString=kv4_set_error)
target_include_directories(_core PRIVATE python/bindings src)
# Link libgomp by SONAME only, so that kv4 and torch share one copy, whichever loads first.
target_link_libraries(_core PRIVATE kv4)
install(TARGETS _core LIBRARY DESTINATION kv4 COMPONENT python)
# Metal kernels are compiled on the user's machine.
install(DIRECTORY src/metal DESTINATION kv4/metal_source COMPONENT python FILES_MATCHING PATTERN "*.metal" PATTERN "*.h")
install(FILES src/format/page.h DESTINATION kv4/metal_source/format COMPONENT python)
