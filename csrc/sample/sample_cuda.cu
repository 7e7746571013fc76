#include "core/cuda/draw.cuh"
#include "core/cuda/rows.cuh"
#include "sample/sample.h"

namespace fastdecode::FD_ISA {
namespace {

__device__ Draw draw_of(const SampleArgs& a, int64_t b) {
  const RandomArgs& random = a.random;
  return {random.uniforms != nullptr, random.uniforms ? random.uniforms[b * random.uniform_stride] : 0.0,
          Noise(random.seed ? random.seed[b] : 0, random.offset ? random.offset[b] : 0, a.stream, a.node)};
}

// A block per row.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) sample_kernel(SampleArgs a, LogitRows rows, int parts) {
  FD_SHARED(LawShared<C>, s);
  const int64_t b = blockIdx.x;
  const auto V = static_cast<int>(a.vocab_size);
  const RowView<T> view = rows.view<T>(b);
  int64_t token = -1;
  int32_t status = 0;
  if (view.live) {
    scan_if_alone(view, V, parts);
    const Draw random = draw_of(a, b);
    status = with_law(view.logits, V, view.filter, view.memory, s, [&](auto& law) { token = draw(law, random); });
  }
  if (threadIdx.x != 0) return;
  a.tokens[b] = token;
  a.status[b] = status;
}

// Few rows and nothing but a temperature: the race itself is cut into parts, after the scan. Their leaders stand behind
// the rows' memory.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) race_kernel(SampleArgs a, LogitRows rows, int parts) {
  FD_SHARED(LawShared<C>, s);
  const int64_t b = blockIdx.x / parts;
  const auto V = static_cast<int>(a.vocab_size), part = static_cast<int>(blockIdx.x % parts);
  const RowView<T> view = rows.view<T>(b);
  if (!view.live) return;
  const Span span = part_of(V, part, parts);
  const Draw random = draw_of(a, b);
  Leader<C> leader;
  const int32_t status = with_law(view.logits, V, view.filter, view.memory, s,
                                  [&](auto& law) { leader = join_leaders(s.slots, race(law, random.noise, span)); });
  if (threadIdx.x != 0) return;
  rows.behind<RacePart>()[blockIdx.x] = {static_cast<double>(leader.best), leader.winner, false};
  if (part == 0) a.status[b] = status;
}

// A block per row.
__global__ void __launch_bounds__(kThreads) race_end_kernel(SampleArgs a, LogitRows rows, int parts) {
  FD_SHARED(BlockSlots, slots);
  const int64_t b = blockIdx.x;
  const bool active = !a.active || a.active[b];
  const int32_t status = active ? a.status[b] : 0;
  int64_t token = -1;
  bool bad;
  if (active && status == 0) token = join_parts(slots, rows.behind<RacePart>() + b * parts, parts, bad);
  if (threadIdx.x != 0) return;
  a.tokens[b] = token;
  a.status[b] = status;
}

LogitRows rows_of(const SampleArgs& a) { return logit_rows(a, a.filters, nullptr, a.batch, 1, 0); }

bool races_in_parts(const SampleArgs& a, int parts) {
  return parts > 1 && a.random.seed && !may_cut(a.filters) && !may_edit(a.filters);
}

template <class T>
void run(const SampleArgs& a, const Exec& ex) {
  const LogitRows rows = rows_of(a);
  const int parts = num_row_parts(a.batch, a.vocab_size, ex);
  launch_scan<T>(rows, parts, ex);
  const unsigned batch = grid_of(a.batch);
  if (!races_in_parts(a, parts)) {
    FD_LAUNCH((sample_kernel<T>), batch, kThreads, 0, ex.stream, a, rows, parts);
    return;
  }
  FD_LAUNCH((race_kernel<T>), grid_of(a.batch * parts), kThreads, 0, ex.stream, a, rows, parts);
  FD_LAUNCH(race_end_kernel, batch, kThreads, 0, ex.stream, a, rows, parts);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::sample_scratch_bytes(const SampleArgs& a, const Exec& ex) {
  const FD_ISA::LogitRows rows = FD_ISA::rows_of(a);
  const int parts = FD_ISA::num_row_parts(a.batch, a.vocab_size, ex);
  const int64_t leaders = FD_ISA::races_in_parts(a, parts) ? a.batch * parts : 0;
  return rows.bytes() + leaders * static_cast<int64_t>(sizeof(FD_ISA::RacePart));
}

void fastdecode::cuda::sample(const SampleArgs& a, const Exec& ex) {
  if (a.batch == 0) return;
  FD_ISA::dispatch_logits(a.dtype, [&](auto tag) { FD_ISA::run<typename decltype(tag)::type>(a, ex); });
}
