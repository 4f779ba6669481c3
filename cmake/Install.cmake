# `cmake --install` and find_package(kv4).

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
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/kv4)
