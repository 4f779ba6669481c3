# The Metal kernels as one text, for compilers without an include path, and on macOS the backend that compiles it.

set(KV4_METAL_TEXT ${PROJECT_BINARY_DIR}/metal/kv4.metal)

# Expands every quoted include in `text` once; files listed in KV4_METAL_DONE are left out.
function(kv4_expand_includes text out)
  set(rest "${text}")
  while(rest MATCHES "(^|\n)([ \t]*#include \"([^\"]+)\"[^\n]*)")
    set(line "${CMAKE_MATCH_2}")
    set(name "${CMAKE_MATCH_3}")
    string(FIND "${rest}" "${line}" at)
    string(LENGTH "${line}" length)
    string(SUBSTRING "${rest}" 0 ${at} before)
    math(EXPR at "${at} + ${length}")
    string(SUBSTRING "${rest}" ${at} -1 after)
    get_property(done GLOBAL PROPERTY KV4_METAL_DONE)
    set(whole "")
    if(NOT name IN_LIST done)
      set_property(GLOBAL APPEND PROPERTY KV4_METAL_DONE ${name})
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name})
      file(READ ${PROJECT_SOURCE_DIR}/src/${name} whole)
    endif()
    set(rest "${before}${whole}${after}")
  endwhile()
  set(${out} "${rest}" PARENT_SCOPE)
endfunction()

set_property(GLOBAL PROPERTY KV4_METAL_DONE)
kv4_expand_includes("#include \"metal/rotate.metal\"\n#include \"metal/attend.metal\"\n#include \"metal/seal.metal\"\n"
                    KV4_METAL_KERNEL_TEXT)
file(CONFIGURE OUTPUT ${KV4_METAL_TEXT} CONTENT "@KV4_METAL_KERNEL_TEXT@" @ONLY)

if(APPLE)
  enable_language(OBJCXX)
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/metal/kv4_metal_kernels.inl
       CONTENT "R\"kv4_metal(@KV4_METAL_KERNEL_TEXT@)kv4_metal\"\n" @ONLY)
  target_sources(kv4 PRIVATE src/metal/gpu.mm)
  set_source_files_properties(src/metal/gpu.mm PROPERTIES COMPILE_OPTIONS "-fobjc-arc;-std=c++20")
  target_include_directories(kv4 PRIVATE ${PROJECT_BINARY_DIR}/metal)
  target_compile_definitions(kv4 PRIVATE KV4_HAS_METAL=1)
  target_link_libraries(kv4 PRIVATE "-framework Metal" "-framework Foundation")
endif()
