# fastdecode::cpu and, with FASTDECODE_CUDA=ON, fastdecode::cuda: the kernels as C++ libraries that need neither torch
# nor Python:
#   find_package(fastdecode COMPONENTS cpu cuda), or add_subdirectory or FetchContent of this repository;
#   target_link_libraries(... fastdecode::cpu); #include <fastdecode/sample/sample.h>.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# The contracts, with `#include "core/..."` spelled `#include "fastdecode/core/..."`, so that a program's own core/ is
# never mistaken for ours.
set(FD_INCLUDE_DIR ${PROJECT_BINARY_DIR}/include)
file(GLOB FD_HEADERS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*.h)
list(FILTER FD_HEADERS EXCLUDE REGEX "/csrc/(bind|host|simt)/|/core/check\\.h$")
foreach(header ${FD_HEADERS})
  cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${PROJECT_SOURCE_DIR}/csrc OUTPUT_VARIABLE name)
  file(READ ${header} text)
  string(REGEX REPLACE "#include \"" "#include \"fastdecode/" text "${text}")
  file(CONFIGURE OUTPUT ${FD_INCLUDE_DIR}/fastdecode/${name} CONTENT "${text}" @ONLY)  # writes only what has changed
endforeach()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${FD_HEADERS})

set(FD_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/fastdecode)
# fastdecode::<device> of `objects`; `kernels` are the targets that these come from
function(fd_add_library device objects kernels)
  set(target fastdecode_${device})
  add_library(${target} ${objects})
  add_library(fastdecode::${device} ALIAS ${target})
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target} INTERFACE
    $<BUILD_INTERFACE:${FD_INCLUDE_DIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${device} LINKER_LANGUAGE CXX)
  if(BUILD_SHARED_LIBS)
    set_target_properties(${target} ${kernels} PROPERTIES CXX_VISIBILITY_PRESET default CUDA_VISIBILITY_PRESET default)
    target_link_options(${target} PRIVATE -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/exports.map)
    set_target_properties(${target} PROPERTIES
      LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/exports.map
      VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
  endif()
  install(TARGETS ${target} EXPORT fastdecode_${device})
  install(EXPORT fastdecode_${device} NAMESPACE fastdecode:: FILE fastdecode_${device}.cmake DESTINATION ${FD_PACKAGE_DIR})
endfunction()

list(TRANSFORM FD_CPU_LEVELS PREPEND fd_cpu_v OUTPUT_VARIABLE FD_CPU_KERNELS)
fd_add_library(cpu "${FD_CPU_OBJECTS}" "${FD_CPU_KERNELS}")
target_link_libraries(fastdecode_cpu PRIVATE $<BUILD_INTERFACE:fd_options>)

set(FD_CUDA_WANTED OFF)  # AUTO asks for what torch was built for
include(cmake/cuda.cmake)
if(FD_HAS_CUDA)
  fd_add_library(cuda "${FD_CUDA_OBJECTS}" fd_cuda)
  target_link_libraries(fastdecode_cuda PUBLIC CUDA::cudart)  # the program's own runtime, whose streams it hands over
endif()

install(DIRECTORY ${FD_INCLUDE_DIR}/fastdecode DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES cmake/fastdecodeConfig.cmake DESTINATION ${FD_PACKAGE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fastdecodeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/fastdecodeConfigVersion.cmake DESTINATION ${FD_PACKAGE_DIR})

option(FASTDECODE_BENCHMARKS "Build bench/cpp/bench_ops (needs Google Benchmark)" OFF)
if(FASTDECODE_BENCHMARKS)
  add_subdirectory(bench/cpp)
endif()
