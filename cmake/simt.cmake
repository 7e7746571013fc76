# _C_simt: the CUDA kernels compiled by the host's compiler and run by csrc/simt, as torch.ops.fastdecode_simt.*. For
# development and tests on machines without a GPU; never part of a released wheel.
option(FASTDECODE_SIMT "Build the CUDA kernels for the host as well, to test them without a GPU" OFF)
option(FASTDECODE_SIMT_SANITIZE "with AddressSanitizer and UBSan; Python must then be started with both preloaded" OFF)
if(NOT FASTDECODE_SIMT)
  return()
endif()

# One C++ file around each .cu, because a source has one language per folder and nvcc may want the same file.
file(GLOB FD_SIMT_KERNELS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*_cuda.cu)
set(FD_SIMT_SOURCES)
foreach(kernel ${FD_SIMT_KERNELS})
  cmake_path(GET kernel STEM name)
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/simt/${name}.cpp CONTENT "#include \"${kernel}\"\n" @ONLY)
  list(APPEND FD_SIMT_SOURCES ${PROJECT_BINARY_DIR}/simt/${name}.cpp)
endforeach()
file(GLOB FD_SIMT_EXECUTOR CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/simt/*.cpp)

fd_add_torch_library(_C_simt fastdecode_simt CPU ${FD_DEVICE_BIND_SOURCES} ${FD_SIMT_SOURCES} ${FD_SIMT_EXECUTOR})
target_compile_definitions(_C_simt PRIVATE FD_SIMT)
# It runs where it was built: fma would be a function call on plain x86-64. "#pragma unroll" is nvcc's; g++ 12 sees
# overlapping copies in sums of strings.
target_compile_options(_C_simt PRIVATE -march=native -Wno-unknown-pragmas -Wno-restrict)
if(FASTDECODE_SIMT_SANITIZE)
  set(FD_SANITIZE -g1 -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
  target_compile_options(_C_simt PRIVATE ${FD_SANITIZE})
  target_link_options(_C_simt PRIVATE ${FD_SANITIZE})
else()
  target_link_options(_C_simt PRIVATE -Wl,-z,defs)
endif()
