# CUDA kernels: every *_cuda.cu by nvcc, into FD_CUDA_OBJECTS. FASTDECODE_CUDA is ON, OFF, or AUTO: where nvcc is found and
# FD_CUDA_WANTED, which the including file sets, holds.
set(FASTDECODE_CUDA AUTO CACHE STRING "Build the CUDA kernels: ON, OFF, or AUTO = where nvcc is found and torch was built for CUDA")
set(FD_HAS_CUDA OFF)
if(NOT FASTDECODE_CUDA MATCHES "^(AUTO|ON|OFF|TRUE|FALSE|YES|NO|1|0)$")
  message(FATAL_ERROR "FASTDECODE_CUDA: expected ON, OFF or AUTO, got ${FASTDECODE_CUDA}")
endif()
if((FASTDECODE_CUDA STREQUAL "AUTO" AND FD_CUDA_WANTED) OR (NOT FASTDECODE_CUDA STREQUAL "AUTO" AND FASTDECODE_CUDA))
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FD_HAS_CUDA ON)
  elseif(FASTDECODE_CUDA STREQUAL "AUTO")
    message(STATUS "no nvcc: building without CUDA kernels")
  else()
    message(FATAL_ERROR "FASTDECODE_CUDA=ON needs nvcc, which was not found: name it with -DCMAKE_CUDA_COMPILER=/path/to/nvcc")
  endif()
endif()
if(NOT FD_HAS_CUDA)
  return()
endif()

# The GPU at hand; without one, Hopper. Wheels: -DCMAKE_CUDA_ARCHITECTURES="80;90-real;100-real;120-real"
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE FD_GPUS RESULT_VARIABLE FD_NO_GPUS OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(FD_NO_GPUS)
    set(FD_GPUS "")
  endif()
  string(REGEX REPLACE "[^0-9\n]" "" FD_GPUS "${FD_GPUS}")
  string(REPLACE "\n" ";" FD_GPUS "${FD_GPUS}")
  list(REMOVE_DUPLICATES FD_GPUS)
  if(FD_GPUS)
    list(TRANSFORM FD_GPUS APPEND "-real")
    set(CMAKE_CUDA_ARCHITECTURES ${FD_GPUS})
  else()
    set(CMAKE_CUDA_ARCHITECTURES 90-real)
  endif()
endif()
enable_language(CUDA)
# For every target that has to do with nvcc; CMake 3.25 knows no later one for it.
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
find_package(CUDAToolkit REQUIRED GLOBAL)  # fastdecode::cuda names its targets to programs that add this folder
message(STATUS "CUDA ${CUDAToolkit_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

file(GLOB FD_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*_cuda.cu)
add_library(fd_cuda OBJECT ${FD_CUDA_SOURCES})
# An a*b+c is fused where fmath.h says so and nowhere else, as on the CPU.
set_target_properties(fd_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden)
target_include_directories(fd_cuda PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
target_compile_options(fd_cuda PRIVATE
  -fmad=false -ftz=false -prec-div=true -prec-sqrt=true --expt-relaxed-constexpr --expt-extended-lambda -lineinfo
  -Xcompiler=-Wall,-Wextra,-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=)
if(FASTDECODE_STRICT)
  target_compile_options(fd_cuda PRIVATE -Xptxas=-v,-warn-spills -Werror=all-warnings)
endif()
set(FD_CUDA_OBJECTS $<TARGET_OBJECTS:fd_cuda>)
