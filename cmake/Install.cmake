# `cmake --install`, find_package(kv4) and pkg-config.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(KV4_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/kv4)
install(TARGETS kv4 EXPORT kv4Targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/kv4 DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT kv4Targets NAMESPACE kv4:: DESTINATION ${KV4_CMAKE_DIR})
configure_package_config_file(cmake/kv4Config.cmake.in ${PROJECT_BINARY_DIR}/kv4Config.cmake
                              INSTALL_DESTINATION ${KV4_CMAKE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kv4ConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/kv4Config.cmake ${PROJECT_BINARY_DIR}/kv4ConfigVersion.cmake
        DESTINATION ${KV4_CMAKE_DIR})
# Private dependencies: programs must link them too with a static library, but not with a shared one.
set(KV4_PC_PRIVATE_LIBS "-lstdc++ -lm")
if(APPLE)
  set(KV4_PC_PRIVATE_LIBS "-lc++ -framework Metal -framework Foundation")
endif()
if(KV4_OPENMP)
  string(REPLACE ";" " " KV4_OPENMP_LIBRARIES "${OpenMP_CXX_LIBRARIES}")
  string(APPEND KV4_PC_PRIVATE_LIBS " ${KV4_OPENMP_LIBRARIES}")
else()
  string(APPEND KV4_PC_PRIVATE_LIBS " -pthread")
endif()
if(KV4_HAS_CUDA)
  string(APPEND KV4_PC_PRIVATE_LIBS " -L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -ldl -lrt -lpthread")
endif()
if(NOT BUILD_SHARED_LIBS)
  set(KV4_PC_LIBS "${KV4_PC_PRIVATE_LIBS}")
  set(KV4_PC_PRIVATE_LIBS "")
endif()
# Relative to the .pc file, so that the installed tree may be moved.
file(RELATIVE_PATH KV4_PC_TO_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(cmake/kv4.pc.in ${PROJECT_BINARY_DIR}/kv4.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/kv4.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/kv4)
