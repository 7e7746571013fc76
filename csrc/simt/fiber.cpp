#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "simt/block.h"

#if FD_SIMT_ASSEMBLY
asm(R"(
  .text
  .hidden fastdecode_simt_switch
  .globl fastdecode_simt_switch
  .type fastdecode_simt_switch, @function
fastdecode_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastdecode_simt_switch, .-fastdecode_simt_switch
)");
#endif

namespace fastdecode::simt {

char* stack_bottom(int i) {
  constexpr size_t kStacks = kMaxLiveBlocks * kMaxThreads;
  // One guard page below each; with pages of 4 KiB that makes 65, and an odd number spreads over the sets of the TLB.
  static const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  static const size_t stride = (kStackBytes / guard + 1) * guard;
  static char* const stacks = [] {
    void* p = mmap(nullptr, kStacks * stride, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(p);
  }();
  static int guarded = 0;  // stacks below have their guard
  for (; guarded <= i; ++guarded) {
    if (mprotect(stacks + guarded * stride, guard, PROT_NONE) != 0) throw std::bad_alloc();
  }
  return stacks + i * stride + guard;
}

void prepare(Fiber& fiber, int i, void (*entry)()) {
  char* const bottom = stack_bottom(i);
  // Tops at one distance from a page boundary would all fall into the same few sets of the first-level cache.
  const size_t colour = static_cast<size_t>(i) * 448 % 4096;
  const size_t size = kStackBytes - colour;
  ASAN_UNPOISON_MEMORY_REGION(bottom + size - 4096, 4096);  // the frame of entry, which nothing left
#if FD_SIMT_ASAN
  fiber.bottom = bottom;
  fiber.size = size;
  fiber.fake_stack = nullptr;
#endif
#if FD_SIMT_ASSEMBLY
  auto* const frame = reinterpret_cast<uintptr_t*>(bottom + size) - 8;
  for (int k = 0; k < 6; ++k) frame[k] = 0;       // callee-saved registers
  frame[6] = reinterpret_cast<uintptr_t>(entry);  // where the switch returns to
  frame[7] = 0;                                   // entry's own return address: debuggers stop here
  fiber.sp = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom;
  fiber.context.uc_stack.ss_size = size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

}  // namespace fastdecode::simt
