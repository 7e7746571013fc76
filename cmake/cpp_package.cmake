# fastdecode::cpu, the kernels as a C++ library that needs neither torch nor Python:
#   find_package(fastdecode), or add_subdirectory or FetchContent of this repository;
#   target_link_libraries(... fastdecode::cpu); #include <fastdecode/sample/sample.h>.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# The contracts, with `#include "core/..."` spelled `#include "fastdecode/core/..."`, so that a program's own core/ is
# never mistaken for ours.
set(FD_INCLUDE_DIR ${PROJECT_BINARY_DIR}/include)
file(GLOB FD_HEADERS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*.h)
list(FILTER FD_HEADERS EXCLUDE REGEX "/csrc/(bind|host)/|/core/check\\.h$")
foreach(header ${FD_HEADERS})
  cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${PROJECT_SOURCE_DIR}/csrc OUTPUT_VARIABLE name)
  file(READ ${header} text)
  string(REGEX REPLACE "#include \"" "#include \"fastdecode/" text "${text}")
  file(CONFIGURE OUTPUT ${FD_INCLUDE_DIR}/fastdecode/${name} CONTENT "${text}" @ONLY)  # writes only what has changed
endforeach()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${FD_HEADERS})

add_library(fastdecode_cpu ${FD_CPU_OBJECTS})
add_library(fastdecode::cpu ALIAS fastdecode_cpu)
target_link_libraries(fastdecode_cpu PRIVATE $<BUILD_INTERFACE:fd_options>)
target_compile_features(fastdecode_cpu PUBLIC cxx_std_20)
target_include_directories(fastdecode_cpu INTERFACE
  $<BUILD_INTERFACE:${FD_INCLUDE_DIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
set_target_properties(fastdecode_cpu PROPERTIES EXPORT_NAME cpu)
if(BUILD_SHARED_LIBS)
  foreach(level ${FD_CPU_LEVELS})
    set_target_properties(fd_cpu_v${level} PROPERTIES CXX_VISIBILITY_PRESET default)
  endforeach()
  set_target_properties(fastdecode_cpu PROPERTIES CXX_VISIBILITY_PRESET default)
  target_link_options(fastdecode_cpu PRIVATE -Wl,--version-script=${CMAKE_CURRENT_LIST_DIR}/exports.map)
  set_target_properties(fastdecode_cpu PROPERTIES
    LINK_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/exports.map
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
endif()

set(FD_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/fastdecode)
install(TARGETS fastdecode_cpu EXPORT fastdecode)
install(DIRECTORY ${FD_INCLUDE_DIR}/fastdecode DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT fastdecode NAMESPACE fastdecode:: FILE fastdecodeConfig.cmake DESTINATION ${FD_PACKAGE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fastdecodeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fastdecodeConfigVersion.cmake DESTINATION ${FD_PACKAGE_DIR})

option(FASTDECODE_BENCHMARKS "Build bench/cpp/bench_ops (needs Google Benchmark)" OFF)
if(FASTDECODE_BENCHMARKS)
  add_subdirectory(bench/cpp)
endif()
