// One source, several instruction sets: CMake compiles every *_cpu.cpp once per x86-64 level, each time with another
// FD_CPU_LEVEL. All code of a build, headers included, stands in the namespace FD_ISA, so that the linker can never
// pick one build's inline function for another (which would crash on an older machine). Level 0 is code that includes
// these headers without being a kernel: adapters, and programs with compiler flags of their own.
#pragma once

#include "core/exec.h"

#ifndef FD_CPU_LEVEL
#define FD_CPU_LEVEL 0
#endif

#if FD_CPU_LEVEL == 0
#define FD_ISA v0
#elif FD_CPU_LEVEL == 1
#define FD_ISA v1
#elif FD_CPU_LEVEL == 3
#define FD_ISA v3
#elif FD_CPU_LEVEL == 4
#define FD_ISA v4
#else
#error "FD_CPU_LEVEL: expected 0, 1, 3 or 4"
#endif

// For functions that work on a whole row: compiled once per element type rather than into each of their callers.
#define FD_ROW [[gnu::noinline]]
// For the arithmetic inside their loops.
#if defined(__CUDACC__)
#define FD_INLINE __forceinline__
#define FD_HD __host__ __device__
#else
#define FD_INLINE [[gnu::always_inline]] inline
#define FD_HD
#endif

// FD_CPU_OP(op, Args) at the end of op_cpu.cpp declares the public cpu::op, which runs the build that ex.cpu_level
// names; the file itself defines FD_ISA::op.
#if FD_CPU_LEVEL == 1 && defined(__x86_64__)
#define FD_CPU_OP(op, Args)                                    \
  namespace fastdecode::v3 {                                   \
  void op(const Args&, const Exec&);                           \
  }                                                            \
  namespace fastdecode::v4 {                                   \
  void op(const Args&, const Exec&);                           \
  }                                                            \
  void fastdecode::cpu::op(const Args& args, const Exec& ex) { \
    if (ex.cpu_level >= 4) return v4::op(args, ex);            \
    if (ex.cpu_level >= 3) return v3::op(args, ex);            \
    v1::op(args, ex);                                          \
  }
#elif FD_CPU_LEVEL == 1
#define FD_CPU_OP(op, Args) \
  void fastdecode::cpu::op(const Args& args, const Exec& ex) { v1::op(args, ex); }
#else
#define FD_CPU_OP(op, Args)
#endif
