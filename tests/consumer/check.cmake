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

# The C example by pkg-config alone. A static library with C++ inside wants its runtime, which kv4.pc names.
find_program(PKG_CONFIG pkg-config)
if(NOT PKG_CONFIG)
  message(STATUS "pkg-config left out: it is not installed")
  return()
endif()
file(GLOB_RECURSE description ${WORK}/prefix/kv4.pc)
cmake_path(GET description PARENT_PATH folder)
set(ENV{PKG_CONFIG_PATH} ${folder})
execute_process(COMMAND ${PKG_CONFIG} --cflags --libs kv4 OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
                COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(flags UNIX_COMMAND "${flags}")
execute_process(COMMAND ${C} ${SOURCE}/../../examples/attend.c ${flags} -o ${WORK}/by_pkg_config
                COMMAND_ERROR_IS_FATAL ANY)
cmake_path(GET folder PARENT_PATH libraries)
set(ENV{LD_LIBRARY_PATH} ${libraries})
execute_process(COMMAND ${WORK}/by_pkg_config COMMAND_ERROR_IS_FATAL ANY)

# The SONAME of a shared library has the minor version.
file(GLOB shared ${libraries}/libkv4.so)
if(shared)
  find_program(READELF readelf REQUIRED)
  execute_process(COMMAND ${READELF} -d ${shared} OUTPUT_VARIABLE dynamic COMMAND_ERROR_IS_FATAL ANY)
  file(STRINGS ${SOURCE}/../../include/kv4/version.h version REGEX "^#define KV4_VERSION \"")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" version "${version}")
  if(NOT dynamic MATCHES "SONAME[^\n]*\\[libkv4\\.so\\.${version}\\]")
    message(FATAL_ERROR "SONAME: expected libkv4.so.${version}; got ${dynamic}")
  endif()
endif()
