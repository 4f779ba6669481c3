# Installs the build BUILD below WORK, then configures, builds and runs the project SOURCE against it.
foreach(command
    "${CMAKE_COMMAND};-E;rm;-rf;${WORK}"
    "${CMAKE_COMMAND};--install;${BUILD};--prefix;${WORK}/prefix"
    "${CMAKE_COMMAND};-S;${SOURCE};-B;${WORK}/build;-G;${GENERATOR};-DCMAKE_MAKE_PROGRAM=${MAKE};-DCMAKE_PREFIX_PATH=${WORK}/prefix;-DCMAKE_C_COMPILER=${C};-DCMAKE_CXX_COMPILER=${CXX};-DCMAKE_BUILD_TYPE=Release"
    "${CMAKE_COMMAND};--build;${WORK}/build"
    "${WORK}/build/from_cpp"
    "${WORK}/build/from_c"
    "${WORK}/build/example_c"
    "${WORK}/build/example_cpp"
    "${WORK}/build/example_server")
  execute_process(COMMAND ${command} COMMAND_ERROR_IS_FATAL ANY)
endforeach()

file(GLOB_RECURSE description ${WORK}/prefix/kv4.pc)
cmake_path(GET description PARENT_PATH folder)
cmake_path(GET folder PARENT_PATH libraries)
set(ENV{LD_LIBRARY_PATH} ${libraries})

# The examples through pkg-config alone. Linking a static C++ library from C needs libstdc++, which kv4.pc lists.
find_program(PKG_CONFIG pkg-config)
if(PKG_CONFIG)
  set(ENV{PKG_CONFIG_PATH} ${folder})
  execute_process(COMMAND ${PKG_CONFIG} --cflags --libs kv4 OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  foreach(compile "${C};${SOURCE}/../../examples/attend.c" "${CXX};-std=c++20;${SOURCE}/../../examples/attend.cpp")
    execute_process(COMMAND ${compile} ${flags} -o ${WORK}/by_pkg_config COMMAND_ERROR_IS_FATAL ANY)
    execute_process(COMMAND ${WORK}/by_pkg_config COMMAND_ERROR_IS_FATAL ANY)
  endforeach()
else()
  message(STATUS "pkg-config left out: it is not installed")
endif()

if(SHARED)
  include(${CMAKE_CURRENT_LIST_DIR}/check_shared.cmake)
endif()
