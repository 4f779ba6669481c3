# Installs the build BUILD below WORK, then configures, builds and runs the project SOURCE against it.
foreach(command
    "${CMAKE_COMMAND};-E;rm;-rf;${WORK}"
    "${CMAKE_COMMAND};--install;${BUILD};--prefix;${WORK}/prefix"
    "${CMAKE_COMMAND};-S;${SOURCE};-B;${WORK}/build;-G;${GENERATOR};-DCMAKE_MAKE_PROGRAM=${MAKE};-DCMAKE_PREFIX_PATH=${WORK}/prefix;-DCMAKE_C_COMPILER=${C};-DCMAKE_CXX_COMPILER=${CXX};-DCMAKE_BUILD_TYPE=Release"
    "${CMAKE_COMMAND};--build;${WORK}/build"
    "${WORK}/build/from_cpp"
    "${WORK}/build/from_c")
  execute_process(COMMAND ${command} COMMAND_ERROR_IS_FATAL ANY)
endforeach()
