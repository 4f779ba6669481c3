# Each pattern of emulation.txt names a test of the program TESTS: cmake -DTESTS=PROGRAM -P emulation.cmake
file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/emulation.txt patterns REGEX "^[^#]")
foreach(pattern IN LISTS patterns)
  execute_process(COMMAND ${TESTS} --gtest_list_tests --gtest_filter=${pattern} OUTPUT_VARIABLE listed
                  COMMAND_ERROR_IS_FATAL ANY)
  if(NOT listed MATCHES "\n  ")
    message(SEND_ERROR "tests/emulation.txt: expected patterns of tests; got ${pattern}, which matches none")
  endif()
endforeach()
