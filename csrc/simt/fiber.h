// Stackful coroutines: a switch saves the callee-saved registers on the stack that it leaves, nothing else.
#pragma once

#include <cstddef>

// FD_SIMT_UCONTEXT: the portable switch, 20 times slower (it sets the signal mask), also on x86-64.
#if defined(__x86_64__) && !defined(FD_SIMT_UCONTEXT)
#define FD_SIMT_ASSEMBLY 1
#else
#define FD_SIMT_ASSEMBLY 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FD_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FD_SIMT_ASAN 1
#endif
#endif
#ifndef FD_SIMT_ASAN
#define FD_SIMT_ASAN 0
#endif
#if FD_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#endif

namespace fastdecode::simt {

inline constexpr size_t kStackBytes = size_t{256} << 10;  // of address space; only touched pages cost memory

struct Fiber {
#if FD_SIMT_ASSEMBLY
  void* sp;
#else
  ucontext_t context;
#endif
#if FD_SIMT_ASAN
  const void* bottom;
  size_t size;
  void* fake_stack;
#endif
};

// The lowest usable byte of stack i. Stacks are mapped once per process and reused.
char* stack_bottom(int i);

// The next switch to `fiber` calls entry() on stack i. entry never returns.
void prepare(Fiber& fiber, int i, void (*entry)());

#if FD_SIMT_ASSEMBLY
extern "C" void fastdecode_simt_switch(void** save, void* next);
#endif

// Goes on with `to`; returns when someone switches back to `from`. last: nobody will.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#if FD_SIMT_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if FD_SIMT_ASSEMBLY
  fastdecode_simt_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#if FD_SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The part of its stack that the next switch to it reads.
inline void prefetch_stack([[maybe_unused]] const Fiber& fiber) {
#if FD_SIMT_ASSEMBLY
  __builtin_prefetch(fiber.sp);
  __builtin_prefetch(static_cast<const char*>(fiber.sp) + 64);
#endif
}

// First thing in entry(). The first fiber of a launch is entered from the thread's own stack, and notes where that is.
inline void fiber_entered([[maybe_unused]] Fiber& main) {
#if FD_SIMT_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!main.bottom) main.bottom = bottom, main.size = size;
#endif
}

}  // namespace fastdecode::simt
