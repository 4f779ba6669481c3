# kv4_cuda: the kernels for NVIDIA GPUs, where nvcc is found. Machine code for compute capabilities 8.0, 8.9 and 9.0, and
# code that later ones compile when it is loaded.

include(CheckLanguage)
if(CMAKE_CROSSCOMPILING OR KV4_SANITIZE)
  set(KV4_CUDA OFF)  # nothing there to run it, or nothing that sees into it
endif()
if(NOT KV4_CUDA STREQUAL "OFF")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(KV4_HAS_CUDA ON)
  elseif(KV4_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KV4_CUDA=ON: expected nvcc on the PATH or in CUDACXX; got none")
  else()
    message(STATUS "CUDA left out: no nvcc found")
  endif()
endif()
if(NOT KV4_HAS_CUDA)
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90)
endif()
if(KV4_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${KV4_CCACHE})
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB KV4_CUDA_SOURCES CONFIGURE_DEPENDS src/cuda/*.cu src/cuda/*.cpp)
add_library(kv4_cuda STATIC ${KV4_CUDA_SOURCES})
target_include_directories(kv4_cuda PUBLIC src include)
target_compile_options(kv4_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${KV4_WARNINGS}>
                                        $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
set_target_properties(kv4_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden)
target_link_libraries(kv4_cuda PUBLIC kv4 CUDA::cudart_static)
