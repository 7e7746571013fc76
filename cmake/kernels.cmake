# CPU kernels: every *_cpu.cpp once per instruction set, behind one name (csrc/core/cpu_level.h).
file(GLOB FD_CPU_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*/*_cpu.cpp)
set(FD_CPU_LEVELS 1)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(FD_CPU_LEVELS 1 3 4)
endif()
# Level 1 is for machines from before 2013: not worth the time that -O3 takes to compile its split vectors.
set(FD_LEVEL_FLAGS_1 $<$<NOT:$<CONFIG:Debug>>:-O2>)
set(FD_LEVEL_FLAGS_3 $<$<NOT:$<CONFIG:Debug>>:-O3> -march=x86-64-v3)
set(FD_LEVEL_FLAGS_4 $<$<NOT:$<CONFIG:Debug>>:-O3> -march=x86-64-v4 -mavx512vnni -mavx512bf16 -mprefer-vector-width=512)

# What every library with the kernels is made of.
set(FD_CPU_OBJECTS ${PROJECT_SOURCE_DIR}/csrc/core/exec.cpp)
foreach(level ${FD_CPU_LEVELS})
  add_library(fd_cpu_v${level} OBJECT ${FD_CPU_SOURCES})
  target_link_libraries(fd_cpu_v${level} PRIVATE fd_options)
  target_compile_definitions(fd_cpu_v${level} PRIVATE FD_CPU_LEVEL=${level})
  target_compile_options(fd_cpu_v${level} PRIVATE ${FD_LEVEL_FLAGS_${level}})
  list(APPEND FD_CPU_OBJECTS $<TARGET_OBJECTS:fd_cpu_v${level}>)
endforeach()
