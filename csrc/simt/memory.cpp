// Shared memory and asynchronous copies into it.
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "simt/internal.h"

namespace fastdecode::simt {
namespace {

constexpr size_t kRedZone = 64;  // between objects, so that an index too far falls on nothing (found by ASan)
constexpr size_t kArenaBytes = size_t{1} << 20;

struct Piece {
  size_t offset, bytes;
};
std::vector<Piece> pieces;  // of the launch; the dynamic memory first
size_t used, static_bytes;

std::byte* arena(int slot) {
  static std::byte* const arenas = [] {
    void* p = mmap(nullptr, kMaxLiveBlocks * kArenaBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<std::byte*>(p);
  }();
  return arenas + slot * kArenaBytes;
}

void poison_piece(int slot, const Piece& piece) {
  ASAN_UNPOISON_MEMORY_REGION(arena(slot) + piece.offset, piece.bytes);
  std::memset(arena(slot) + piece.offset, grid.poison, piece.bytes);
}

}  // namespace

void begin_shared_launch() {
  pieces.assign(1, {0, grid.shared_bytes});
  used = grid.shared_bytes;
  static_bytes = 0;
  ASAN_POISON_MEMORY_REGION(arena(0), kMaxLiveBlocks * kArenaBytes);
}

void start_shared(Block& block) {
  block.arena = arena(block.slot);
  for (const Piece& piece : pieces) poison_piece(block.slot, piece);
}

void* shared_memory(SharedSlot& slot, size_t bytes, size_t alignment) {
  if (slot.launch != grid.launch) {  // first use in this launch: place it, for every block at once
    static_bytes += (bytes + 15) / 16 * 16;
    if (static_bytes > kMaxStaticShared || static_bytes + grid.shared_bytes > kMaxShared) {
      fault("shared memory: expected at most ", kMaxStaticShared, " bytes static and ", kMaxShared, " in all, got ",
            static_bytes, " static and ", grid.shared_bytes, " dynamic");
    }
    const size_t unit = alignment < 16 ? 16 : alignment;
    slot.offset = (used + kRedZone + unit - 1) / unit * unit;
    slot.launch = grid.launch;
    used = slot.offset + bytes;
    pieces.push_back({slot.offset, bytes});
    for (int i = 0; i < kMaxLiveBlocks; ++i) poison_piece(i, pieces.back());
  }
  return current->block->arena + slot.offset;
}

void* dynamic_shared_memory(size_t alignment) {
  if (alignment > 16) fault("dynamic shared memory: expected an alignment of at most 16, got ", alignment);
  return current->block->arena;
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
