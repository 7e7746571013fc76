// Between the parts of the executor.
#pragma once

#include <sstream>
#include <string>

#include "simt/block.h"

namespace fastdecode::simt {

// queue.cpp: who runs next
void clear_queue();
void wake(Warp& warp, uint32_t lanes);  // these lanes can run, in any order
void wake_all(Block& block);
Thread* take();                    // out of the queue; nullptr if nobody can run
Thread* exchange(Thread* thread);  // another one out of the queue, and this one in
uint32_t random_bits();

// block.cpp
void park();  // the running thread waits until it is woken

// memory.cpp
void begin_shared_launch();
void start_shared(Block& block);
void check_red_zones(const Block& block);  // when its threads have exited

// checks.cpp
void note_barrier(Call call, Site site);  // for the list of barriers
bool skipped(Call call, Site site);       // by Config::skip_barrier
[[noreturn]] void stuck(Block& block);    // none of its threads can run
std::string located(const std::string& what, const Thread& thread);
std::string waits(const Thread& thread);  // "waits in ..."
std::string position(uint3 v);
std::string lanes(uint32_t mask);
std::ostream& operator<<(std::ostream& out, Call call);
std::ostream& operator<<(std::ostream& out, Site site);

// Not inlined: the streams would widen the stack frames that every switch goes through.
template <class... Parts>
[[gnu::noinline, gnu::cold]] std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Ends the launch: unwinds the running thread to its base. Reported as the fault of `thread`.
[[noreturn]] void report(const std::string& what, const Thread* thread);
template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fault(const Parts&... parts) {
  report(text(parts...), current);
}

}  // namespace fastdecode::simt
