# The compiled half of the wheel: _C_cpu, _host and where asked for _C_cuda and _C_simt, installed into the package's folder.
set(FASTDECODE_NAMESPACE fastdecode CACHE STRING "torch.ops namespace of the kernels; tests build mutants under another one")
set(CMAKE_SKIP_RPATH ON)

# --- torch, found through the interpreter that will run the package (build isolation hides it from this one) ---------
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH ${Python_EXECUTABLE} -I -c
    "import torch, pathlib; print(torch.__version__, pathlib.Path(torch.__file__).parent, bool(torch.version.cuda), sep=';')"
  OUTPUT_VARIABLE FD_TORCH OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE FD_TORCH_FAILED
  ERROR_VARIABLE FD_TORCH_ERROR ERROR_STRIP_TRAILING_WHITESPACE)
if(FD_TORCH_FAILED)
  string(REGEX REPLACE ".*\n" "" FD_TORCH_ERROR "${FD_TORCH_ERROR}")
  message(FATAL_ERROR
    "fastdecode builds against the torch of ${Python_EXECUTABLE}, which does not import (${FD_TORCH_ERROR}): "
    "run `pip install torch`, then install fastdecode again. The C++ library alone needs no torch: -DFASTDECODE_TORCH=OFF.")
endif()
list(GET FD_TORCH 0 FD_TORCH_VERSION)
list(GET FD_TORCH 1 FD_TORCH_DIR)
list(GET FD_TORCH 2 FD_TORCH_CUDA)
if(FD_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "fastdecode needs torch >= 2.10, found ${FD_TORCH_VERSION}: run `pip install -U torch`, then install fastdecode again.")
endif()
message(STATUS "torch ${FD_TORCH_VERSION} in ${FD_TORCH_DIR}")

# --- The kernel libraries, on torch's stable ABI; they know nothing of Python ----------------------------------------
function(fd_add_torch_library target namespace dispatch_key)
  add_library(${target} MODULE ${ARGN})
  target_link_libraries(${target} PRIVATE fd_options)
  target_include_directories(${target} SYSTEM PRIVATE ${FD_TORCH_DIR}/include)
  target_compile_definitions(${target} PRIVATE
    TORCH_TARGET_VERSION=0x020a000000000000 FD_NAMESPACE=${namespace} FD_DISPATCH_KEY=${dispatch_key})
  target_link_directories(${target} PRIVATE ${FD_TORCH_DIR}/lib)
  target_link_libraries(${target} PRIVATE torch_cpu)
  set_target_properties(${target} PROPERTIES PREFIX "" SUFFIX ".so")
  install(TARGETS ${target} LIBRARY DESTINATION fastdecode)
endfunction()

file(GLOB FD_BIND_SOURCES CONFIGURE_DEPENDS csrc/bind/*.cpp)
set(FD_HOST_BIND_SOURCES ${FD_BIND_SOURCES})
list(FILTER FD_BIND_SOURCES EXCLUDE REGEX "/host_[^/]*\\.cpp$")
list(FILTER FD_HOST_BIND_SOURCES INCLUDE REGEX "/host_[^/]*\\.cpp$")
set(FD_DEVICE_BIND_SOURCES ${FD_BIND_SOURCES})
list(FILTER FD_DEVICE_BIND_SOURCES EXCLUDE REGEX "/runtime\\.cpp$")

# _C_cpu: schemas and CPU kernels
fd_add_torch_library(_C_cpu ${FASTDECODE_NAMESPACE} CPU ${FD_BIND_SOURCES} ${FD_CPU_OBJECTS})
target_link_options(_C_cpu PRIVATE -Wl,-z,defs)

# _C_cuda: the same adapters over the CUDA kernels. Torch's CUDA functions are in libtorch_cuda, which a CPU build of
# torch lacks; libtorch.so leads to it where it exists, so that a machine without a GPU can build for one that has it.
set(FD_CUDA_WANTED ${FD_TORCH_CUDA})
include(cmake/cuda.cmake)
if(FD_HAS_CUDA)
  fd_add_torch_library(_C_cuda ${FASTDECODE_NAMESPACE} CUDA ${FD_DEVICE_BIND_SOURCES} ${FD_CUDA_OBJECTS})
  target_compile_definitions(_C_cuda PRIVATE FD_CUDA USE_CUDA)
  # static: the name of the shared runtime differs between the wheels of CUDA 12 and 13
  target_link_libraries(_C_cuda PRIVATE CUDA::cudart_static)
  target_link_options(_C_cuda PRIVATE -Wl,--no-as-needed ${FD_TORCH_DIR}/lib/libtorch.so -Wl,--as-needed)
  set_target_properties(_C_cuda PROPERTIES LINKER_LANGUAGE CXX)
endif()

include(cmake/simt.cmake)

# --- _host: data structures of the drafters and the enums, by pybind11; knows nothing of torch -----------------------
find_package(pybind11 CONFIG REQUIRED)
file(GLOB FD_HOST_SOURCES CONFIGURE_DEPENDS csrc/host/*.cpp)
pybind11_add_module(_host MODULE ${FD_HOST_SOURCES} ${FD_HOST_BIND_SOURCES})
target_link_libraries(_host PRIVATE fd_options)
install(TARGETS _host LIBRARY DESTINATION fastdecode)
