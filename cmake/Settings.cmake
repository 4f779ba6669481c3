# Compiler settings that every target of this build shares.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, Debug or RelWithDebInfo" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12)
  message(FATAL_ERROR "compiler: expected g++ 12 or later, or clang; got g++ ${CMAKE_CXX_COMPILER_VERSION}")
elseif(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  message(FATAL_ERROR "compiler: expected g++ or clang, whose vector extensions the kernels use; got "
                      "${CMAKE_CXX_COMPILER_ID}")
endif()

find_program(KV4_CCACHE ccache)
if(KV4_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_C_COMPILER_LAUNCHER ${KV4_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${KV4_CCACHE})
endif()

# -Wno-psabi: vector types never cross the library's interface, so their calling convention does not matter.
set(KV4_WARNINGS -Wall -Wextra -Wno-psabi)
if(KV4_WERROR)
  list(APPEND KV4_WARNINGS -Werror)
endif()

if(KV4_SANITIZE)
  if(NOT KV4_SANITIZE MATCHES "^(address|undefined|address,undefined|thread)$")
    message(FATAL_ERROR "KV4_SANITIZE: expected address, undefined, address,undefined or thread; got ${KV4_SANITIZE}")
  endif()
  if(KV4_SANITIZE STREQUAL "thread" AND KV4_OPENMP)
    message(FATAL_ERROR "KV4_SANITIZE=thread: expected KV4_OPENMP=OFF (libgomp is not instrumented); got ON")
  endif()
  add_compile_options(-fsanitize=${KV4_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all -g -O1)
  add_link_options(-fsanitize=${KV4_SANITIZE})
endif()

if(KV4_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "KV4_FUZZ: expected clang, which has libFuzzer; got ${CMAKE_CXX_COMPILER_ID}")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()
