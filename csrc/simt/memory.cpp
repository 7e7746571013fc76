// Shared memory and asynchronous copies into it.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "simt/internal.h"

namespace fastdecode::simt {
namespace {

constexpr size_t kRedZone = 128;  // before the first object and behind each: who indexes too far falls on nothing
constexpr size_t kArenaBytes = size_t{1} << 20;
constexpr int kUntouched = 0xa5;  // what red zones hold

struct Piece {
  size_t offset, bytes;
};
std::vector<Piece> pieces;  // of the launch; the dynamic memory first
size_t static_bytes;

std::byte* arena(int slot) {
  static std::byte* const arenas = [] {
    void* p = mmap(nullptr, kMaxLiveBlocks * kArenaBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    ASAN_POISON_MEMORY_REGION(p, kMaxLiveBlocks * kArenaBytes);
    return static_cast<std::byte*>(p);
  }();
  return arenas + slot * kArenaBytes;
}

void fill(int slot, const Piece& piece) {
  std::byte* const begin = arena(slot) + piece.offset;
  ASAN_UNPOISON_MEMORY_REGION(begin, piece.bytes);
  std::memset(begin, grid.poison, piece.bytes);
  if constexpr (!FD_SIMT_ASAN) std::memset(begin + piece.bytes, kUntouched, kRedZone);
}

// A new piece, at the same place in every arena.
size_t place(size_t bytes, size_t alignment) {
  const size_t end = pieces.empty() ? 0 : pieces.back().offset + pieces.back().bytes;
  pieces.push_back({(end + kRedZone + alignment - 1) / alignment * alignment, bytes});
  for (int slot = 0; slot < kMaxLiveBlocks; ++slot) fill(slot, pieces.back());
  return pieces.back().offset;
}

}  // namespace

void begin_shared_launch() {
  if (!pieces.empty()) {
    const size_t end = pieces.back().offset + pieces.back().bytes;
    for (int slot = 0; slot < kMaxLiveBlocks; ++slot) ASAN_POISON_MEMORY_REGION(arena(slot), end);
  }
  pieces.clear();
  static_bytes = 0;
  place(grid.shared_bytes, kRedZone);
}

void start_shared(Block& block) {
  block.arena = arena(block.slot);
  for (const Piece& piece : pieces) fill(block.slot, piece);
}

void check_red_zones(const Block& block) {
  if constexpr (FD_SIMT_ASAN) return;  // which has reported the access itself
  for (const Piece& piece : pieces) {
    const std::byte* const end = block.arena + piece.offset + piece.bytes;
    const auto written = std::find_if(end, end + kRedZone, [](std::byte b) { return b != std::byte{kUntouched}; });
    if (written != end + kRedZone) {
      fault("out of bounds: a thread of its block has written byte ", piece.bytes + (written - end), " of a ",
            piece.bytes, "-byte object in shared memory; AddressSanitizer will name thread and line");
    }
  }
}

void* shared_memory(SharedSlot& slot, size_t bytes, size_t alignment) {
  if (slot.launch != grid.launch) {  // the first use in this launch
    static_bytes += (bytes + 15) / 16 * 16;
    if (static_bytes > kMaxStaticShared || static_bytes + grid.shared_bytes > kMaxShared) {
      fault("shared memory: expected at most ", kMaxStaticShared, " bytes static and ", kMaxShared, " in all, got ",
            static_bytes, " static and ", grid.shared_bytes, " dynamic");
    }
    slot.offset = place(bytes, alignment < 16 ? 16 : alignment);
    slot.launch = grid.launch;
  }
  return current->block->arena + slot.offset;
}

void* dynamic_shared_memory(size_t alignment) {
  if (alignment > 16) fault("dynamic shared memory: expected an alignment of at most 16, got ", alignment);
  return current->block->arena + pieces.front().offset;
}

void async_copy(void* shared, const void* global, int bytes, Site site) {
  Thread& me = *current;
  check_aligned(shared, static_cast<size_t>(bytes), site.file, site.line);
  check_aligned(global, static_cast<size_t>(bytes), site.file, site.line);
  const auto* to = static_cast<std::byte*>(shared);
  if (to < me.block->arena || to + bytes > me.block->arena + kArenaBytes) {
    fault("cp.async (", site, "): the destination is not in the block's shared memory");
  }
  me.copies.push_back({shared, global, static_cast<uint32_t>(bytes), me.open_group});
  // Until the wait nobody may look: a reader finds poison, or is reported by ASan.
  std::memset(shared, grid.poison, static_cast<size_t>(bytes));
  ASAN_POISON_MEMORY_REGION(shared, static_cast<size_t>(bytes));
}

void async_commit() { ++current->open_group; }

void async_wait(int groups_left) {
  Thread& me = *current;
  size_t kept = 0;
  for (const AsyncCopy& copy : me.copies) {
    if (copy.group + static_cast<uint32_t>(groups_left) < me.open_group) {
      ASAN_UNPOISON_MEMORY_REGION(copy.shared, copy.bytes);
      std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
      me.copies[kept++] = copy;
    }
  }
  me.copies.resize(kept);
}

}  // namespace fastdecode::simt
